"""Loads the base pipeline as the config asks for it."""

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderTiny,
    AutoModel,
    BitsAndBytesConfig,
    DiffusionPipeline,
    MotionAdapter,
    PipelineQuantizationConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from rlr_peft.build.reporting import hide_loading_bars
from rlr_peft.chain.base_files import check_loaded, loading_base, read_model_index
from rlr_peft.chain.families import DENOISERS, GENERIC, family_of_class
from rlr_peft.chain.memory import offload_models
from rlr_peft.config import ConfigError, ModelArguments
from rlr_peft.config.memory_checks import read_quantization
from rlr_peft.tiny_shapes import PIPELINE_NAME, pipeline_path

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What some pipeline classes take besides their models, and what it must be here.
SETTINGS: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}


def load_pipeline(arguments: ModelArguments, device: torch.device) -> DiffusionPipeline:
    """The frozen base pipeline on its device, in eval mode and without safety checker.

    With ``offload`` its models stay in host memory and come to the device when they are called.

    Raises:
        BaseModelError: the folder or the Hub repository does not hold a diffusers pipeline that can be loaded.
        ValueError: the VAE cannot recompute its activations, or the denoiser cannot use the attention backend.
    """
    hide_loading_bars()
    dtype = DTYPES[arguments.mixed_precision]
    name = arguments.pretrained_model_name_or_path
    source = str(pipeline_path()) if name == PIPELINE_NAME else name
    where = {"revision": arguments.revision, "cache_dir": arguments.cache_dir}
    index = read_model_index(source, **where)
    replaced: dict[str, Any] = {}
    vae_name, motion_name = (
        arguments.pretrained_vae_model_name_or_path,
        arguments.pretrained_motion_adapter_name_or_path,
    )
    if vae_name is not None:
        with loading_base(vae_name):
            replaced["vae"] = AutoModel.from_pretrained(vae_name, dtype=dtype, cache_dir=arguments.cache_dir)
    pipeline_class: Any = DiffusionPipeline
    if motion_name is not None:
        pipeline_class = diffusers.AnimateDiffPipeline
        with loading_base(motion_name):
            replaced["motion_adapter"] = MotionAdapter.from_pretrained(
                motion_name, dtype=dtype, cache_dir=arguments.cache_dir
            )
    with loading_base(name):
        pipeline = pipeline_class.from_pretrained(
            source,
            variant=arguments.variant,
            dtype=dtype,
            **where,
            **_settings(pipeline_class, index),
            **pipeline_quantization(arguments, dtype),
            **replaced,
        )
    check_loaded(name, pipeline)
    if not arguments.offload:
        pipeline.to(device)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
            keep_weights_as_quantized(component)
    vae = getattr(pipeline, "vae", None)
    if vae is not None and dtype == torch.float16 and hasattr(pipeline, "upcast_vae") and vae.config.force_upcast:
        # The pipeline (SDXL) would cast it to and fro around each decode, under the feet of the tape.
        logger.info("The VAE overflows in fp16 and is kept in fp32; --pretrained_vae_model_name_or_path replaces it.")
        vae.to(torch.float32)
    if arguments.vae_gradient_checkpointing:
        enable_checkpointing(vae, "vae_gradient_checkpointing")
    if arguments.attention_backend is not None:
        set_attention_backend(pipeline, arguments.attention_backend)
    if arguments.offload:
        offload_models(pipeline, device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_reward_decoder(
    arguments: ModelArguments, pipeline: DiffusionPipeline, device: torch.device
) -> AutoencoderTiny | None:
    """The small VAE that decodes for the training reward, frozen; None if none is asked for.

    Raises:
        OSError: the folder or the Hub repository does not hold an AutoencoderTiny.
        ValueError: it decodes other latents than the pipeline's.
    """
    name = arguments.pretrained_tiny_vae_name_or_path
    if name is None:
        return None
    decoder = AutoencoderTiny.from_pretrained(
        name, dtype=DTYPES[arguments.mixed_precision], cache_dir=arguments.cache_dir
    )
    check_reward_decoder(pipeline, decoder)
    if arguments.vae_gradient_checkpointing:
        enable_checkpointing(decoder, "vae_gradient_checkpointing")
    return decoder.to(device).requires_grad_(False).eval()


def check_reward_decoder(pipeline: Any, decoder: Any) -> None:
    """Raises a ValueError where the decoder does not decode the pipeline's latents."""
    vae = getattr(pipeline, "vae", None)
    channels = getattr(getattr(vae, "config", None), "latent_channels", None)
    if type(vae).__name__ != "AutoencoderKL" or channels != decoder.config.latent_channels:
        raise ValueError(
            f"pretrained_tiny_vae_name_or_path: expected a pipeline with an AutoencoderKL of "
            f"{decoder.config.latent_channels} latent channels, as the tiny VAE has, got {type(vae).__name__} with "
            f"{channels}; use the tiny VAE of the base's family (taesd, taesdxl, taesd3, taef1) or leave "
            "--pretrained_tiny_vae_name_or_path out."
        )


def enable_checkpointing(model: Any, flag: str) -> None:
    """Recomputes the model's activations in the backward pass.

    Raises:
        ValueError: the model's class cannot.
    """
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"{flag}: diffusers' {type(model).__name__} cannot recompute its activations; leave --{flag} out and lower "
            "the batch, the resolution or, of a video, --decoded_frames."
        )
    model.enable_gradient_checkpointing()


def _settings(pipeline_class: Any, index: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the class of the pipeline takes; the others would be reported as ignored."""
    if pipeline_class is DiffusionPipeline:
        pipeline_class = getattr(diffusers, index["_class_name"])
    taken = inspect.signature(pipeline_class.__init__).parameters
    return {name: value for name, value in SETTINGS.items() if name in taken}


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
    names = dict.fromkeys(DENOISERS, config)
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
