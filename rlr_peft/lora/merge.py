"""Fuses the adapter into the base: a pipeline that needs no LoRA any more."""

from typing import Any

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.lora import LoraLayer
from torch import nn


def merge_lora(pipeline: Any) -> list[str]:
    """Adds every loaded adapter to the base's weights and removes its layers.

    Args:
        pipeline: with one adapter loaded, by diffusers or by `load_lora`; changed in place. Float32 weights lose the
            least.

    Returns:
        The attributes of the pipeline that were changed.

    Raises:
        ValueError: no adapter is loaded, or its weights are not finite.
    """
    changed = []
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        layers = [layer for layer in part.modules() if isinstance(layer, LoraLayer)]
        if not layers:
            continue
        for layer in layers:
            layer.merge(safe_merge=True)
        recurse_remove_peft_layers(part)
        del part.peft_config
        if hasattr(part, "_hf_peft_config_loaded"):  # else diffusers would look for layers that are gone
            part._hf_peft_config_loaded = False  # type: ignore[assignment]
        changed.append(name)
    if not changed:
        raise ValueError("No adapter is loaded: it has no layers for this pipeline, so it belongs to another base.")
    return changed
