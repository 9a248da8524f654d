"""The config's chain over a pipeline, the adapters that are trained in it, and images that are drawn with it.

Images are drawn without dropout, without gradients, and never with NaN unsaid. Where stage prompts condition the steps
of their stages, `StageForm` decides how (`--dcot_form`), for training and inference.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.build.machine import derive_seed, total_memory
from rlr_peft.build.pipeline import enable_checkpointing
from rlr_peft.build.reporting import as_config_error
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.encodings import MAX_CHECKED, TextRoom
from rlr_peft.chain.families import DENOISERS, Family, lora_targets
from rlr_peft.chain.memory import working_device
from rlr_peft.chain.stepped_pipeline import steers_from_texts
from rlr_peft.config import ChainArguments, Config, ConfigError, stages_from_config
from rlr_peft.config.chain import AUTO, StageFormName
from rlr_peft.errors import UserError
from rlr_peft.estimators.forward import holding
from rlr_peft.lora import adapter_disabled, attach_lora, lora_size
from rlr_peft.prompt import Prompt
from rlr_peft.prompts.chain_of_thought import as_contrast, as_part, is_split_by_rules


@as_config_error()
def build_chain(config: Config, pipeline: DiffusionPipeline, **of_training: Any) -> DenoisingChain:
    """The config's chain over a pipeline, for drawing.

    Args:
        pipeline: loaded, with its adapters if it has any.
        of_training: further arguments of ``DenoisingChain``.
    """
    stages = stages_from_config(config)
    return DenoisingChain(
        pipeline,
        config.chain,
        denoisers=config.lora.denoisers,
        stages=stages,
        stage_form=None if stages is None else stage_form(config, pipeline),
        reference=adapter_disabled,
        **of_training,
    )


@as_config_error()
def evaluation_chain(config: Config, chain: DenoisingChain) -> DenoisingChain:
    """The chain with which images are drawn that are looked at, in the comparison, in validation and on the card."""
    looking = config.validation
    return chain.at(
        eta=looking.evaluation_eta,
        steps=looking.evaluation_steps,
        guidance=looking.evaluation_guidance_scale,
        resolution=looking.evaluation_resolution,
        scheduler=looking.evaluation_scheduler,
        whole=True,
    )


def evaluation_in_words(config: Config, chain: DenoisingChain) -> str:
    """What images that are looked at are drawn with."""
    size = config.validation.evaluation_resolution
    return evaluation_chain(config, chain).sampling_in_words() + (f", at {size} x {size} pixels" if size else "")


def build_training_chain(
    config: Config, pipeline: DiffusionPipeline, reward_decoder: torch.nn.Module | None
) -> DenoisingChain:
    """The chain that is trained, before any update; what decodes for its reward is None for the pipeline's own VAE."""
    chain = build_chain(
        config,
        pipeline,
        decoded_frames=config.reward.decoded_frames,
        reward_decoder=reward_decoder,
        detach_negative=config.training.detach_negative,
    )
    if config.lora.reference == "init_adapter":
        start = [parameter.detach().clone() for parameter in chain.parameters]
        chain.reference = lambda denoiser: holding(chain.parameters, start)
    return chain


def attach_adapters(config: Config, pipeline: DiffusionPipeline, family: Family) -> list[torch.nn.Parameter]:
    """Adapters of all trained denoisers, on the pipeline's working device; their parameters in the chain's order.

    Raises:
        ConfigError: a part that takes no denoising steps, or whose adapter no pipeline loads.
    """
    others = [name for name in family.denoisers if name not in DENOISERS]
    if others:
        raise ConfigError(
            f"--denoiser: expected {', '.join(DENOISERS)}, whose adapters can be saved and loaded, got "
            f"{', '.join(others)} of {type(pipeline).__name__}; leave --denoiser out, or name one of these."
        )
    parameters = []
    for index, name in enumerate(family.denoisers):
        seed = derive_seed(config.training.seed, "lora", *([index] if index else []))
        parameters += _attach_one(config, getattr(pipeline, name), family, seed)
    return parameters


def _attach_one(config: Config, denoiser: torch.nn.Module, family: Family, seed: int) -> list[torch.nn.Parameter]:
    lora = config.lora
    targets = lora_targets(lora.lora_layers, family, denoiser)
    _check_size(denoiser, targets, lora.rank)
    parameters = attach_lora(
        denoiser,
        target_modules=targets,
        rank=lora.rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=lora.init_lora_weights,
        seed=seed,
    )
    if config.model.gradient_checkpointing:
        enable_checkpointing(denoiser, "gradient_checkpointing")
    denoiser.train(lora.lora_dropout > 0)
    if config.model.offload:  # the base waits in host memory
        for parameter in parameters:
            parameter.data = parameter.data.to(working_device(denoiser))
    return parameters


def _check_size(denoiser: torch.nn.Module, targets: Sequence[str], rank: int) -> None:
    """Before anything is allocated: where the adapter alone fills the memory, its rank is a mistake.

    Raises:
        ConfigError: weights, gradients and Adam's two moments are more than there is.
    """
    device = working_device(denoiser)
    needed, total = 16 * lora_size(denoiser, targets, rank), total_memory(device)
    if total is not None and needed > total:
        raise ConfigError(
            f"rank: expected an adapter that fits the {total / 2**30:.3g} GiB of {device.type} memory, got {rank}, "
            f"which takes {needed / 2**30:.3g} GiB with gradients and optimiser state; lower --rank or name "
            "fewer --lora_layers."
        )


def check_trajectory(config: Config, chain: DenoisingChain) -> None:
    """Before anything is sampled: where the latents of one micro-batch alone fill the memory, it cannot run.

    Raises:
        ConfigError: latents, noises and predictions of all steps are more than there is.
    """
    batch, steps = config.training.train_batch_size, chain.num_steps
    needed = batch * (3 * steps + 2) * math.prod(chain.latents_shape) * chain.latents_dtype.itemsize
    total = total_memory(chain.device)
    if total is not None and needed > total:
        raise ConfigError(
            f"train_batch_size: expected samples that fit the {total / 2**30:.3g} GiB of {chain.device.type} memory, "
            f"got {batch} of {steps} steps with latents of {' x '.join(map(str, chain.latents_shape))}, which take "
            f"{needed / 2**30:.3g} GiB; lower --train_batch_size, the resolution or --num_inference_steps."
        )


logger = logging.getLogger(__name__)


class ImagesError(UserError, ValueError):
    """Images that are no images: NaN or infinity somewhere on the way."""


@torch.no_grad()
def render(chain: DenoisingChain, prompts: list[Prompt], seeds: list[int]) -> torch.Tensor:
    """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1]; sample i depends on its prompt and seed alone.

    Raises:
        ImagesError: the latents of a step or the decoded images are not finite.
    """
    return render_with_latents(chain, prompts, seeds)[0]


@torch.no_grad()
def render_with_latents(
    chain: DenoisingChain, prompts: list[Prompt], seeds: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of `render`, and the clean latents (B, ...) that they are decoded from."""
    with in_eval_mode(chain):
        latents = chain.draw(prompts, seeds)
        images = chain.decode(latents[0], prompts).float()
    _check_finite(latents, images, prompts)
    flat = images.flatten(1)
    constant = [prompt for prompt, of_one_colour in zip(prompts, flat.amax(1) == flat.amin(1)) if of_one_colour]
    if constant:
        logger.warning(
            "%d of %d images have one colour throughout, the first is of %r: the reward was pushed too far, or numbers "
            "overflowed; look at them, and try --mixed_precision bf16 or no.",
            *(len(constant), len(prompts), constant[0].text),
        )
    return images, latents[0]


def _check_finite(latents: torch.Tensor, images: torch.Tensor, prompts: Sequence[Prompt]) -> None:
    """Names the first step after which numbers are not finite: ``latents`` are (T + 1, B, ...), noise last."""
    broken = ~images.flatten(1).isfinite().all(1)
    if not broken.any():
        return
    first = next(prompt for prompt, is_broken in zip(prompts, broken) if is_broken)
    finite = [bool(step.isfinite().all()) for step in latents]
    if finite[0]:
        where = "the latents are finite and the decoded images are not"
        advice = (
            "the decoder overflowed: use --mixed_precision bf16 or no, or a VAE made for fp16 "
            "(--pretrained_vae_model_name_or_path)"
        )
    else:
        good = [t for t, is_finite in enumerate(finite) if is_finite]
        since = f" from step {len(finite) - good[0]} of {len(finite) - 1} on" if good else ""
        where = f"the denoiser's latents are not finite{since}"
        advice = (
            "use --mixed_precision bf16 or no, check the base's and the adapter's weights, or train with a lower "
            "--learning_rate"
        )
    raise ImagesError(
        f"Expected finite images, got NaN or infinity in {int(broken.sum())} of {len(prompts)}, the first of "
        f'"{first}": {where}; {advice}.'
    )


@contextmanager
def in_eval_mode(chain: DenoisingChain) -> Iterator[None]:
    """Inside, the denoiser has no dropout."""
    was_training = chain.denoiser.training
    chain.denoiser.eval()
    try:
        yield
    finally:
        chain.denoiser.train(was_training)


@dataclass(frozen=True)
class StageForm:
    """Conditions a stage on its own prompt, or on the whole one in contrast to the rest of it.

    With ``auto`` every prompt decides for itself, whatever is drawn beside it: a contrast harms no caption that was
    measured, but needs guidance away from a text and all of the caption; what somebody wrote for a stage is that
    stage's prompt.

    Attributes:
        name: as in the config.
        steers: whether there is guidance that leads away from a text.
        room: what the text encoders see.
        by_rules: whether the rules split prompts. What is theirs word for word is still not theirs where columns or a
            model told it.
    """

    name: StageFormName
    steers: bool
    room: TextRoom
    by_rules: bool = True

    def __call__(self, prompt: Prompt, index: int) -> Prompt:
        """The prompt that conditions a stage."""
        return (as_contrast if self.is_contrast(prompt) else as_part)(prompt, index)

    def is_contrast(self, prompt: Prompt) -> bool:
        """Whether the whole prompt conditions all of its stages."""
        if self.name != AUTO:
            return self.name == "contrast"
        return self.steers and self.by_rules and _fits_and_is_split_by_rules(prompt.text, prompt.stages, self.room)

    def contrasts_among(self, prompts: Sequence[Prompt]) -> tuple[int, int]:
        """How many of the different texts are contrasts, and of how many that were looked at."""
        looked_at = _different(prompts)
        return sum(map(self.is_contrast, looked_at)), len(looked_at)

    def describe(self, prompts: Sequence[Prompt]) -> str:
        """In words for the log: `as parts (guidance leads away from no text)`."""
        contrasts, looked_at = self.contrasts_among(prompts)
        if contrasts == looked_at > 0:
            return "as a contrast"
        if self.name != AUTO:
            return "as parts"
        why = self._why_parts(_different(prompts))
        some = f"as a contrast ({contrasts} of {looked_at} prompts, else as parts: {why})"
        return some if contrasts else f"as parts ({why})"

    def _why_parts(self, prompts: Sequence[Prompt]) -> str:
        """What keeps these from being contrasts, as far as they are none."""
        if not self.by_rules:
            return "the rules did not split the prompts"
        if not self.steers:
            return "guidance leads away from no text"
        cut = len(self.room.beyond([prompt.text for prompt in prompts]))
        edited = sum(not self.is_contrast(prompt) for prompt in prompts) - cut
        reasons = {"longer than the text encoder holds": cut, "with stage prompts that were edited": edited}
        return ", ".join(f"{count:,} {words}" for words, count in reasons.items() if count)


def _different(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One prompt of every text, up to so many that looking at them costs nothing."""
    return list({prompt.text: prompt for prompt in prompts if prompt.stages}.values())[:MAX_CHECKED]


@lru_cache(maxsize=MAX_CHECKED)  # asked at every step
def _fits_and_is_split_by_rules(text: str, stages: tuple[str, ...], room: TextRoom) -> bool:
    return is_split_by_rules(text, stages) and not room.beyond([text])


def stage_form(config: Config, pipeline: DiffusionPipeline) -> StageForm:
    """That of a run.

    Raises:
        ValueError: a contrast is asked for where no guidance leads away from a text.
    """
    asked = config.chain_of_thought
    return choose_stage_form(asked.dcot_form, pipeline, config.chain, config.lora.denoisers, by_rules=asked.dcot_rules)


def choose_stage_form(
    name: StageFormName,
    pipeline: DiffusionPipeline,
    arguments: ChainArguments,
    denoisers: Sequence[str] | None = None,
    *,
    by_rules: bool = True,
) -> StageForm:
    """That of a chain; the guidance of training decides, also where images are drawn with another.

    Raises:
        ValueError: a contrast is asked for where no guidance leads away from a text.
    """
    steers = steers_from_texts(pipeline, arguments, denoisers)
    if name == "contrast" and not steers:
        raise ValueError(
            f"dcot_form: expected guidance that leads away from a text with contrast, which {type(pipeline).__name__} "
            "lacks here: it is off, built into the model, or takes no negative prompt. Raise --guidance_scale or "
            "--true_cfg_scale, or use --dcot_form parts."
        )
    return StageForm(name, steers, TextRoom.of(pipeline, arguments.max_sequence_length), by_rules)
