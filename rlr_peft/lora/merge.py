"""Fuses the adapter into the base: a pipeline that needs no LoRA any more."""

from collections.abc import Mapping
from typing import Any

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.lora import LoraLayer
from torch import nn

from rlr_peft.lora.errors import AdapterFormatError


def merge_lora(pipeline: Any) -> list[str]:
    """Adds every loaded adapter to the base's weights and removes its layers.

    Args:
        pipeline: with one adapter loaded, by diffusers or by `load_lora`; changed in place. Float32 weights lose the
            least.

    Returns:
        The attributes of the pipeline that were changed.

    Raises:
        ValueError: no adapter is loaded, or the sum is not finite.
        AdapterFormatError: the adapter has a bias for a layer of the base that has none.
    """
    changed = []
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        layers = {path: layer for path, layer in part.named_modules() if isinstance(layer, LoraLayer)}
        if not layers:
            continue
        _check_biases(name, layers)
        for layer in layers.values():
            layer.merge(safe_merge=True)
        recurse_remove_peft_layers(part)
        del part.peft_config
        if hasattr(part, "_hf_peft_config_loaded"):  # else diffusers would look for layers that are gone
            part._hf_peft_config_loaded = False  # type: ignore[assignment]
        changed.append(name)
    if not changed:
        raise ValueError("No adapter is loaded: it has no layers for this pipeline, so it belongs to another base.")
    return changed


def _check_biases(part: str, layers: Mapping[str, Any]) -> None:
    without = [
        name for name, layer in layers.items() if any(layer.lora_bias.values()) and layer.get_base_layer().bias is None
    ]
    if without:
        raise AdapterFormatError(
            f"Expected an adapter that the weights of the base can hold, got one with biases (peft's lora_bias) for "
            f"{len(without)} layers that have none ({part}.{without[0]}, ...): it cannot be merged; use it as "
            "an adapter."
        )
