"""Loads the base pipeline as the config asks for it."""

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from rlr_peft.config import ModelArguments
from rlr_peft.tiny_shapes import PIPELINE_NAME, pipeline_path
from rlr_peft.training.logs import hide_loading_bars

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(arguments: ModelArguments, device: torch.device) -> DiffusionPipeline:
    """The frozen base pipeline on its device, in eval mode and without safety checker.

    Raises:
        OSError: the folder or the Hub repository does not hold a diffusers pipeline.
    """
    hide_loading_bars()
    dtype = DTYPES[arguments.mixed_precision]
    name = arguments.pretrained_model_name_or_path
    replaced = {}
    if arguments.pretrained_vae_model_name_or_path is not None:
        replaced["vae"] = AutoencoderKL.from_pretrained(
            arguments.pretrained_vae_model_name_or_path, dtype=dtype, cache_dir=arguments.cache_dir
        )
    pipeline = DiffusionPipeline.from_pretrained(
        str(pipeline_path()) if name == PIPELINE_NAME else name,
        revision=arguments.revision,
        variant=arguments.variant,
        cache_dir=arguments.cache_dir,
        dtype=dtype,
        safety_checker=None,
        requires_safety_checker=False,
        **replaced,
    ).to(device)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    if arguments.vae_gradient_checkpointing:
        pipeline.vae.enable_gradient_checkpointing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
