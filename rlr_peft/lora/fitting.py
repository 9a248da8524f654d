"""Puts an adapter into a base for a while, and takes it out again without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.lora import LoraLayer
from torch import nn

from rlr_peft.lora.loading import load_fitting_lora
from rlr_peft.lora.sources import AdapterFiles


@contextmanager
def adapter_loaded(pipeline: Any, files: AdapterFiles) -> Iterator[None]:
    """Inside, the pipeline draws with the adapter; afterwards it is the base again, bit for bit.

    Raises:
        AdapterFormatError, AdapterMismatchError: the adapter is of another model, damaged, or no adapter.
    """
    if _adapted_layers(pipeline):
        raise ValueError("adapter_loaded expects a pipeline without adapters, got one that has some.")
    try:
        load_fitting_lora(pipeline, files)
        yield
    finally:
        unload_lora(pipeline)


def unload_lora(pipeline: Any) -> None:
    """Takes every adapter out of the pipeline; its layers are then the base's own again.

    Not through `pipeline.unload_lora_weights`, which fails where diffusers has no loader for the denoiser.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and any(isinstance(module, LoraLayer) for module in part.modules()):
            recurse_remove_peft_layers(part)
            for attribute in ("peft_config", "_hf_peft_config_loaded"):
                part.__dict__.pop(attribute, None)


def adapted_parts(pipeline: Any) -> list[str]:
    """The attributes of the pipeline whose module has adapted layers now, text encoders included."""
    return sorted({name.split(".")[0] for name in _adapted_layers(pipeline)})


def _adapted_layers(pipeline: Any) -> list[str]:
    return [
        f"{part}.{name}"
        for part, model in pipeline.components.items()
        if isinstance(model, nn.Module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (len(module.lora_A) or len(module.lora_embedding_A))
    ]
