"""The config's chain over a pipeline, and the adapters that are trained in it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.build.machine import total_memory
from rlr_peft.build.pipeline import enable_checkpointing
from rlr_peft.build.randomness import derive_seed
from rlr_peft.build.reporting import as_config_error
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.families import DENOISERS, Family, lora_targets
from rlr_peft.chain.memory import working_device
from rlr_peft.config import Config, ConfigError, stages_from_config
from rlr_peft.lora import adapter_disabled, attach_lora, lora_size


@as_config_error()
def build_chain(
    config: Config, pipeline: DiffusionPipeline, eta: float | None = None, **of_training: Any
) -> DenoisingChain:
    """The config's chain over a pipeline, for drawing.

    Args:
        config: of the run.
        pipeline: loaded, with its adapters if it has any.
        eta: another amount of noise than the config's; see ``DenoisingChain.at`` for a further chain.
        of_training: further arguments of ``DenoisingChain``.
    """
    return DenoisingChain(
        pipeline,
        config.chain if eta is None else replace(config.chain, eta=eta),
        denoisers=denoiser_names(config),
        stages=stages_from_config(config),
        offload_text_encoders=config.model.offload_text_encoders and not config.model.offload,
        reference=adapter_disabled,
        **of_training,
    )


def build_training_chain(
    config: Config, pipeline: DiffusionPipeline, reward_decoder: torch.nn.Module | None
) -> DenoisingChain:
    """The chain that is trained; what decodes for its reward is None for the pipeline's own VAE."""
    return build_chain(
        config,
        pipeline,
        decoded_frames=config.reward.decoded_frames,
        reward_decoder=reward_decoder,
        detach_negative=config.training.detach_negative,
    )


def denoiser_names(config: Config) -> list[str] | None:
    """The attributes of the pipeline that the config says to train; None leaves it to the family."""
    names = config.lora.denoiser
    return None if names is None else [name.strip() for name in names.split(",")]


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
