"""Base against adapters as `rlr-peft compare` asks for it: loads, draws and measures, or finds it done already."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rlr_peft.build.chain import build_chain, evaluation_chain, evaluation_in_words, render
from rlr_peft.build.machine import derive_seed, describe_hardware, package_versions, prepare_machine
from rlr_peft.build.pipeline import check_image_sizes, load_pipeline
from rlr_peft.build.prompts import comparison_prompts, describe_chain_of_thought
from rlr_peft.build.reporting import as_config_error
from rlr_peft.build.rewards import reward_settings
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.steps import noisy_steps
from rlr_peft.compare.comparison import BASE, Comparison, MeasuredReward, Model, file_name, unique_labels
from rlr_peft.compare.distances import find_features, measure_divergence, path_divergence
from rlr_peft.compare.evaluation import Evaluation, FeatureExtractor, Render, evaluate, prompts_and_seeds
from rlr_peft.compare.kept import (
    KeptFeatures,
    KeptImages,
    KeptReward,
    digest,
    image_paths,
    kept_divergence,
    model_identity,
    reward_identity,
)
from rlr_peft.config import Config, stages_from_config
from rlr_peft.config.model import quantization_file
from rlr_peft.config.training import MOST_EVALUATION_IMAGES
from rlr_peft.files import sha256_of
from rlr_peft.foreign_text import listed, shown_name
from rlr_peft.lora import AdapterFiles, adapted_parts, adapter_loaded, check_adapter, find_adapter
from rlr_peft.prompt import Prompt, texts_of
from rlr_peft.rewards.base import Reward, refuse_latents
from rlr_peft.rewards.combination import unique_names
from rlr_peft.rewards.registry import load_reward

logger = logging.getLogger(__name__)

IMAGES, KEPT = "images", "kept"
MOST_KL_IMAGES = 32


@dataclass(frozen=True)
class CompareOptions:
    """What a comparison is told besides the config.

    Attributes:
        adapters: folders, files or Hub repositories.
        output: folder of the report, of the images and of all that is kept.
        images_per_prompt: images drawn of every prompt that is used.
        kl_images: samples for the divergence from the base, 0 leaves it out; None for `MOST_KL_IMAGES`, or as many as
            images are drawn if those are fewer.
        features: by what variety is measured, see `find_features`.
        hub_token: for private repositories; None takes the one that the machine is logged in with.
    """

    adapters: Sequence[str]
    output: Path
    images_per_prompt: int = 4
    kl_images: int | None = None
    features: str = "auto"
    hub_token: str | None = None


def compare_adapters(config: Config, options: CompareOptions) -> Comparison:
    """Draws and measures the base and every adapter; the cheap checks first, so that a mistake costs seconds.

    Raises:
        ConfigError: the base or the chain cannot be built as asked for.
        AdapterNotFoundError, AdapterFormatError, AdapterMismatchError: an adapter is not there, is none, or does not
            fit the base.
        PromptError, RewardError: prompts or rewards that cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_machine(config.model, device)
    check_image_sizes(config)
    labels = unique_labels(options.adapters)
    prompts = comparison_prompts(config, device)
    adapters = [
        find_adapter(place, token=options.hub_token, cache_dir=config.model.cache_dir) for place in options.adapters
    ]
    for files in adapters:
        check_adapter(files)
    rewards, measured = load_compared_rewards(config, device)
    extractor = find_features(
        options.features,
        config.model.pretrained_model_name_or_path,
        [reward for _, reward in rewards.values()],
        reward_settings(config, device).model,
    )
    with as_config_error():
        pipeline = load_pipeline(config.model, device)
    for files in adapters:  # one that does not fit shows before hours of drawing
        with adapter_loaded(pipeline, files):
            pass
    return _Comparer(config, options, pipeline, prompts, rewards, extractor).compare(
        dict(zip(labels, adapters, strict=True)), measured
    )


class _Comparer:
    """One comparison at work: everything that all models share."""

    def __init__(
        self,
        config: Config,
        options: CompareOptions,
        pipeline: DiffusionPipeline,
        prompts: list[Prompt],
        rewards: dict[str, tuple[str, Reward]],
        extractor: FeatureExtractor,
    ) -> None:
        self.config, self.options, self.pipeline = config, options, pipeline
        validation, seed = config.validation, config.training.seed
        self.batch_size = validation.evaluation_batch_size
        self.all_prompts = prompts
        self.drawn = prompts_and_seeds(
            prompts,
            validation.num_evaluation_images or MOST_EVALUATION_IMAGES,
            derive_seed(seed, "evaluation"),
            options.images_per_prompt,
        )
        self.setup = image_setup(config, pipeline)
        kept = options.output / KEPT
        held = [
            config.reward.reward_dtype,
            config.reward.reward_model_path,
            *(config.reward.vlm_question, config.reward.vlm_answers, config.reward.vlm_endpoint),
            self.setup["versions"],
            self.setup["device"],
        ]
        self.rewards = {
            name: KeptReward(reward, kept, [reward_identity(spec), held]) for name, (spec, reward) in rewards.items()
        }
        of_features = [options.features, extractor.name, model_identity(options.features), held]
        self.extractor = KeptFeatures(extractor, kept, of_features)

    def compare(self, adapters: dict[str, AdapterFiles], measured: list[MeasuredReward]) -> Comparison:
        """The base, then every adapter in turn."""
        sampler = evaluation_in_words(self.config, build_chain(self.config, self.pipeline))
        base = self._model(BASE, None)
        models = []
        for label, files in adapters.items():
            with adapter_loaded(self.pipeline, files):
                models.append(self._model(label, files.fingerprint()))
        return Comparison(measured, base, models, self._facts(sampler, adapters, measured), self.extractor.name)

    def _model(self, label: str, fingerprint: str | None) -> Model:
        """Draws and measures the pipeline as it is now.

        Args:
            fingerprint: of the adapter inside; None for the base.
        """
        output, (prompts, seeds) = self.options.output, self.drawn
        # A chain for every model: its adapter may change the text encoder too, and with it the embeddings.
        chain = build_chain(self.config, self.pipeline)
        looking = evaluation_chain(self.config, chain)
        identity = digest(self.setup, fingerprint)
        images = KeptImages(
            output / IMAGES / f"{file_name(label)}-{identity[:8]}",
            lambda texts, numbers: render(looking, texts, numbers),
        )
        evaluation = self._evaluate(images, label)
        divergence = None if fingerprint is None else self._divergence(label, identity, chain)
        return Model(label, evaluation, divergence, image_paths(images, prompts, seeds, output))

    def _evaluate(self, images: Render, label: str) -> Evaluation:
        prompts, seeds = self.drawn
        return evaluate(
            images,
            prompts,
            seeds,
            self.rewards,
            self.batch_size,
            num_kept_images=0,
            features=self.extractor,
            description=label,
        )

    def _divergence(self, label: str, identity: str, chain: DenoisingChain) -> Tensor | None:
        """KL from the base of the adapter that is in the pipeline; None where it is not defined."""
        count, seed = self.options.kl_images, derive_seed(self.config.training.seed, "divergence")
        count = min(MOST_KL_IMAGES, len(self.drawn[0])) if count is None else count
        if count == 0 or not noisy_steps(chain):
            return None
        if set(adapted_parts(self.pipeline)) - set(chain.family.denoisers):
            logger.warning("%s also adapts the text encoder: its KL from the base is not measured.", label)
            return None
        prompts, seeds = prompts_and_seeds(self.all_prompts, count, seed)
        measure = kept_divergence(
            lambda texts, numbers: path_divergence(chain, texts, numbers),
            self.options.output / KEPT,
            [identity, self.config.chain.eta],
        )
        return measure_divergence(measure, prompts, seeds, self.batch_size, description=f"{label}, KL")

    def _facts(self, sampler: str, adapters: dict[str, AdapterFiles], measured: list[MeasuredReward]) -> dict[str, str]:
        """What is compared, in words and without a path of this machine."""
        config, prompts = self.config, texts_of(self.drawn[0])
        chain_of_thought = describe_chain_of_thought(config, self.pipeline, self.drawn[0])
        hub = {label: files.place for label, files in adapters.items() if not Path(files.place).exists()}
        return {
            "base": shown_name(config.model.pretrained_model_name_or_path),
            "adapters": ", ".join(hub.get(label, label) for label in adapters),
            "sampler": sampler,
            "prompts": f"{len(set(prompts))} of {len(set(texts_of(self.all_prompts)))} in {prompt_source(config)}, "
            f"{images_of_each(prompts)}",
            **({"stages": chain_of_thought} if chain_of_thought else {}),
            "seed": str(config.training.seed),
            "rewards": ", ".join(f"{reward.name}{' (held out)' if reward.heldout else ''}" for reward in measured),
            "features": self.extractor.name,
            "number format": {"no": "fp32"}.get(config.model.mixed_precision, config.model.mixed_precision),
            "hardware": describe_hardware(torch.device(self.setup["device"])),
        }


def images_of_each(prompts: Sequence[str]) -> str:
    """How many images a prompt has; the last one may have fewer."""
    fewest, most = min(counts := Counter(prompts).values()), max(counts)
    return f"{most} image{'s' if most > 1 else ''} each" if fewest == most else f"{fewest} to {most} images each"


def load_compared_rewards(
    config: Config, device: torch.device
) -> tuple[dict[str, tuple[str, Reward]], list[MeasuredReward]]:
    """Every reward with its spec by a short name, those of a weighted sum one by one; and how they are called."""
    arguments, settings = config.reward, reward_settings(config, device)
    trained = [arguments.reward_fn] if isinstance(arguments.reward_fn, str) else list(arguments.reward_fn)
    heldout = list(arguments.heldout_reward_fn or ())
    rewards = {f"reward{index}": (spec, load_reward(spec, settings)) for index, spec in enumerate([*trained, *heldout])}
    for _, reward in rewards.values():
        refuse_latents(reward, "a comparison looks at")
    names = unique_names([reward for _, reward in rewards.values()])
    measured = [
        MeasuredReward(key, name, spec in heldout)
        for (key, (spec, _)), name in zip(rewards.items(), names, strict=True)
    ]
    return rewards, measured


def prompt_source(config: Config) -> str:
    """Where the prompts come from, for others to read."""
    prompts, own_file = config.prompts, config.validation.evaluation_prompt_path
    names = [own_file] if own_file is not None else list(prompts.weights) or [prompts.dataset_name or ""]
    return listed([shown_name(name) for name in names])


def image_setup(config: Config, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """All but adapter, prompt and seed that an image depends on, in plain values."""
    model, stages = config.model, stages_from_config(config)
    settings = model.bnb_quantization_config_path
    quantization = None if settings is None else sha256_of(quantization_file(settings))
    form = [config.chain_of_thought.dcot_form, config.chain_of_thought.dcot_rules]  # `auto` goes by both
    names = (
        model.pretrained_model_name_or_path,
        model.pretrained_vae_model_name_or_path,
        model.pretrained_motion_adapter_name_or_path,
    )
    return {
        "models": [model_identity(name, model.revision, model.cache_dir) for name in names],
        "class": type(pipeline).__name__,
        "variant": model.variant,
        "precision": [model.mixed_precision, quantization],
        "kernels": [model.attention_backend, model.allow_tf32, model.full_determinism],
        "chain": {name: value for name, value in asdict(config.chain).items() if name != "eta"},
        "stages": None if stages is None else asdict(stages) | {"form": form},
        "evaluation": [
            *(config.validation.evaluation_eta, config.validation.evaluation_steps),
            *(config.validation.evaluation_guidance_scale, config.validation.evaluation_resolution),
            config.validation.evaluation_scheduler,
        ],
        "denoisers": config.lora.denoisers,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": package_versions(),
    }
