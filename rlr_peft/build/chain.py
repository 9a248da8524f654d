"""The config's chain over a pipeline, the adapters that are trained in it, and images that are drawn with it.

Images are drawn without dropout, without gradients, and never with NaN unsaid.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.build.machine import total_memory
from rlr_peft.build.pipeline import denoiser_names, enable_checkpointing
from rlr_peft.build.randomness import derive_seed
from rlr_peft.build.reporting import as_config_error
from rlr_peft.build.stage_form import stage_form
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.families import DENOISERS, Family, lora_targets
from rlr_peft.chain.memory import working_device
from rlr_peft.config import Config, ConfigError, stages_from_config
from rlr_peft.errors import UserError
from rlr_peft.estimators.forward import holding
from rlr_peft.lora import adapter_disabled, attach_lora, lora_size
from rlr_peft.prompt import Prompt


@as_config_error()
def build_chain(config: Config, pipeline: DiffusionPipeline, **of_training: Any) -> DenoisingChain:
    """The config's chain over a pipeline, for drawing.

    Args:
        config: of the run.
        pipeline: loaded, with its adapters if it has any.
        of_training: further arguments of ``DenoisingChain``.
    """
    stages = stages_from_config(config)
    return DenoisingChain(
        pipeline,
        config.chain,
        denoisers=denoiser_names(config),
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
