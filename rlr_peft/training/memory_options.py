"""Options that save memory or time and need the machine or the model: what they demand, and switching them on."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from rlr_peft.chain.families import GENERIC, family_of_class
from rlr_peft.config import ConfigError, ModelArguments
from rlr_peft.config.model import read_quantization

WITHOUT_GPU = (
    "bnb_quantization_config_path: expected a GPU, which bitsandbytes' quantised layers need, got a machine without "
    "one; run on a GPU or leave --bnb_quantization_config_path out."
)
OFFLOAD_WITHOUT_GPU = "offload: expected a GPU, whose memory it spares, got a machine without one; leave --offload out."


def check_machine(arguments: ModelArguments, device: torch.device) -> None:
    """Refuses, before any download, what this machine cannot do.

    Raises:
        ConfigError: an option that needs a GPU on a machine without.
    """
    if device.type != "cpu":
        return
    if arguments.bnb_quantization_config_path is not None:
        raise ConfigError(WITHOUT_GPU)
    if arguments.offload:
        raise ConfigError(OFFLOAD_WITHOUT_GPU)


def pipeline_quantization(arguments: ModelArguments, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` of a pipeline is told so that its denoisers are held in 4 or 8 bits."""
    if arguments.bnb_quantization_config_path is None:
        return {}
    settings = read_quantization(arguments.bnb_quantization_config_path)
    if settings.get("load_in_4bit"):
        settings = {"bnb_4bit_compute_dtype": dtype} | settings
    config = BitsAndBytesConfig(**settings)
    names = dict.fromkeys(("unet", "transformer", "transformer_2"), config)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=names)}


def keep_weights_as_quantized(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in the first forward without gradients on a CPU.

    On processors with AVX512-BF16 it does so by default. A repacked layer has no gradient, and layers with rows shorter
    than a block of 64 weights fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def set_attention_backend(pipeline: DiffusionPipeline, backend: str) -> None:
    """Chooses the attention kernel of every denoiser that the pipeline has.

    Raises:
        ValueError: an unknown name, a kernel that is not installed, or a denoiser that leaves no choice.
    """
    known = sorted(name.value for name in AttentionBackendName)
    if backend not in known:
        raise ValueError(f"attention_backend: expected one of {', '.join(known)}, got {backend}.")
    family = family_of_class(type(pipeline).__name__) or GENERIC
    for name in family.denoisers:
        denoiser = getattr(pipeline, name, None)
        if denoiser is None:
            continue
        processors = (getattr(module, "processor", None) for module in denoiser.modules())
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ValueError(
                f"attention_backend: diffusers offers no choice for {type(denoiser).__name__}, which uses torch's own "
                "fused attention; leave --attention_backend out."
            )
        try:
            denoiser.set_attention_backend(backend)
        except RuntimeError as error:
            raise ValueError(f"attention_backend: {backend} cannot be used here: {error}") from error


def compile_denoisers(denoisers: Iterable[nn.Module]) -> None:
    """Compiles the repeated blocks where the class names them, which starts far faster, else the whole denoiser."""
    for denoiser in denoisers:
        if getattr(denoiser, "_repeated_blocks", None):
            denoiser.compile_repeated_blocks()  # type: ignore[operator]
        else:
            denoiser.compile()
