"""Loads a saved adapter: as diffusers does, and through peft where diffusers has no loader for a denoiser."""

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from rlr_peft.lora.export import WEIGHT_NAME

SECOND_EXPERT = "transformer_2"
"""The attribute of a second denoiser, and the subfolder of its adapter."""


def diffusers_loads(pipeline: Any, denoiser: nn.Module) -> bool:
    """Whether `pipeline.load_lora_weights` reaches this denoiser. UNet3DConditionModel and PixArt have no loader."""
    return hasattr(pipeline, "load_lora_weights") and hasattr(denoiser, "load_lora_adapter")


def load_lora(pipeline: Any, directory: str | Path) -> None:
    """Puts the adapter of a folder that `save_lora` wrote into a pipeline of any family.

    Args:
        pipeline: the base that it was trained on.
        directory: holds `pytorch_lora_weights.safetensors`, of a pipeline with two experts also `transformer_2/`.

    A folder without such a file is left to `pipeline.load_lora_weights`.

    Raises:
        ValueError: the adapter's metadata name a module to import.
    """
    places = (Path(directory) / WEIGHT_NAME, Path(directory) / SECOND_EXPERT / WEIGHT_NAME)
    files = [file for file in places if file.exists()]
    for file in files or Path(directory).glob("*.safetensors"):
        refuse_code(file)
    if not files:
        pipeline.load_lora_weights(str(directory))
    for file in files:
        second = file.parent.name == SECOND_EXPERT and getattr(pipeline, SECOND_EXPERT, None) is not None
        if second:
            pipeline.load_lora_weights(str(file.parent), load_into_transformer_2=True)
            continue
        with safe_open(file, "pt") as header:
            prefixes = {name.split(".")[0] for name in header.keys()}  # noqa: SIM118 (it is no dictionary)
        # Beside the denoiser's there may be a text encoder's part, which diffusers loads where it can load at all.
        prefix = next((name for name in ("unet", "transformer") if name in prefixes), "")
        denoiser = getattr(pipeline, prefix, None)
        if denoiser is None or diffusers_loads(pipeline, denoiser):
            pipeline.load_lora_weights(str(directory))
        else:
            _inject(denoiser, file, prefix)


def refuse_code(file: Path) -> None:
    """Raises ValueError for an adapter with `megatron_config`: older versions of peft import any module it names."""
    with safe_open(file, "pt") as header:
        saved = json.loads((header.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if any(name.rpartition(".")[2] == "megatron_config" and value for name, value in saved.items()):
        raise ValueError(
            f"the metadata of {file.name} ask to import a module (megatron_config), which no adapter needs"
        )


def _inject(denoiser: nn.Module, file: Path, prefix: str) -> None:
    tensors = {name.removeprefix(f"{prefix}."): tensor for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as header:
        saved = json.loads(header.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{name.removeprefix(f"{prefix}."): value for name, value in saved.items()})
    dtype = next(denoiser.parameters()).dtype
    inject_adapter_in_model(config, denoiser)
    set_peft_model_state_dict(denoiser, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    for name, parameter in denoiser.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)
    denoiser.eval()
