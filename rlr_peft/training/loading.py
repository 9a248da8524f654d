"""Loads the base pipeline as the config asks for it."""

import inspect
import logging
from typing import Any

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline, MotionAdapter

from rlr_peft.config import ModelArguments
from rlr_peft.tiny_shapes import PIPELINE_NAME, pipeline_path
from rlr_peft.training.logs import hide_loading_bars

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What some pipeline classes take besides their models, and what it must be here.
SETTINGS: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}


def load_pipeline(arguments: ModelArguments, device: torch.device) -> DiffusionPipeline:
    """The frozen base pipeline on its device, in eval mode and without safety checker.

    Raises:
        OSError: the folder or the Hub repository does not hold a diffusers pipeline.
        ValueError: the VAE cannot recompute its activations.
    """
    hide_loading_bars()
    dtype = DTYPES[arguments.mixed_precision]
    name = arguments.pretrained_model_name_or_path
    source = str(pipeline_path()) if name == PIPELINE_NAME else name
    where = {"revision": arguments.revision, "cache_dir": arguments.cache_dir}
    replaced: dict[str, Any] = {}
    if arguments.pretrained_vae_model_name_or_path is not None:
        replaced["vae"] = AutoModel.from_pretrained(
            arguments.pretrained_vae_model_name_or_path, dtype=dtype, cache_dir=arguments.cache_dir
        )
    pipeline_class: Any = DiffusionPipeline
    if arguments.pretrained_motion_adapter_name_or_path is not None:
        pipeline_class = diffusers.AnimateDiffPipeline
        replaced["motion_adapter"] = MotionAdapter.from_pretrained(
            arguments.pretrained_motion_adapter_name_or_path, dtype=dtype, cache_dir=arguments.cache_dir
        )
    pipeline = pipeline_class.from_pretrained(
        source,
        variant=arguments.variant,
        dtype=dtype,
        **where,
        **_settings(pipeline_class, source, where),
        **replaced,
    ).to(device)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    vae = getattr(pipeline, "vae", None)
    if vae is not None and dtype == torch.float16 and hasattr(pipeline, "upcast_vae") and vae.config.force_upcast:
        # The pipeline (SDXL) would cast it to and fro around each decode, under the feet of the tape.
        logger.info("The VAE overflows in fp16 and is kept in fp32; --pretrained_vae_model_name_or_path replaces it.")
        vae.to(torch.float32)
    if arguments.vae_gradient_checkpointing:
        enable_checkpointing(vae, "vae_gradient_checkpointing")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def _settings(pipeline_class: Any, source: str, where: dict[str, Any]) -> dict[str, Any]:
    """The settings that the class of the pipeline takes; the others would be reported as ignored."""
    if pipeline_class is DiffusionPipeline:
        class_name = DiffusionPipeline.load_config(source, **where).get("_class_name")
        pipeline_class = getattr(diffusers, str(class_name), None)
    if pipeline_class is None:
        return {}
    taken = inspect.signature(pipeline_class.__init__).parameters
    return {name: value for name, value in SETTINGS.items() if name in taken}
