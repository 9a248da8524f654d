"""Loads an adapter into a base and makes sure that all of it arrived; and takes it out again without a trace.

diffusers loads what it recognises and passes over the rest, often without a word: an adapter of another model then
draws the base's images, and nobody knows.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from rlr_peft.lora.export import WEIGHT_NAME
from rlr_peft.lora.loading import load_lora, refuse_code
from rlr_peft.lora.sources import AdapterFiles
from rlr_peft.lora.verify import AdapterMismatchError, without_text_encoder_notice

# The part of a tensor's name from which on it says which matrix of an adapted layer it is, in all spellings in use:
# `.lora_A.weight`, `.lora.up.weight`, `_lora.down.weight`, `.lora_down.weight`, `.lora_magnitude_vector`.
_MATRIX = re.compile(r"[._]lora[._](?:A|B|up|down|magnitude|embedding|linear_layer)\b.*|[._]lora_magnitude_vector.*")


@contextmanager
def adapter_loaded(pipeline: Any, files: AdapterFiles) -> Iterator[None]:
    """Inside, the pipeline draws with the adapter; afterwards it is the base again, bit for bit.

    Raises:
        AdapterMismatchError: the adapter is of another model, or damaged.
    """
    if _adapted_layers(pipeline):
        raise ValueError("adapter_loaded expects a pipeline without adapters, got one that has some.")
    try:
        load_fitting_lora(pipeline, files)
        yield
    finally:
        unload_lora(pipeline)


def load_fitting_lora(pipeline: Any, files: AdapterFiles) -> int:
    """Loads an adapter as diffusers does, and counts what arrived.

    Args:
        pipeline: the base, without adapters.
        files: the adapter.

    Returns:
        Number of adapted layers.

    Raises:
        AdapterMismatchError: nothing or less was loaded than the file holds, or shapes differ.
    """
    expected = {layer for path in files.paths for layer in _layers_in(path)}
    try:
        with without_text_encoder_notice(), _quiet_loader():
            if files.weight_name == WEIGHT_NAME:
                load_lora(pipeline, files.folder)
            else:
                refuse_code(files.folder / files.weight_name)
                pipeline.load_lora_weights(str(files.folder), weight_name=files.weight_name)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterMismatchError(f"{_does_not_fit(pipeline, files)}: {_gist(error)}") from error
    loaded = len(_adapted_layers(pipeline))
    # More is right: layers that are one in the file and several in diffusers, such as a joint query-key-value.
    if loaded == 0 or loaded < len(expected):
        examples = ", ".join(sorted(expected)[:2])
        raise AdapterMismatchError(
            f"{_does_not_fit(pipeline, files)}: of its {len(expected)} layers ({examples}, ...) {loaded} found a "
            "place, and diffusers passes over the rest without an error. Take the base that it was trained on."
        )
    return loaded


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


def _layers_in(path: Path) -> set[str]:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterMismatchError(f"{path.name} cannot be read ({error}): it is damaged; get it again.") from None
    prefix = f"{path.parent.name}." if path.parent.name.startswith("transformer_") else ""
    return {prefix + _MATRIX.sub("", name) for name in names if _MATRIX.search(name)}


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Keeps diffusers from logging all of an error that is raised anyway."""
    logger = logging.getLogger("diffusers.loaders.peft")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _gist(error: Exception) -> str:
    """The one line of an error that says most: torch lists every layer of another size."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    sizes = [line for line in lines if line.startswith("size mismatch")]
    if sizes:
        return f"{len(sizes)} of its matrices have other sizes; {sizes[0]}"[:400]
    return lines[0][:400]


def _does_not_fit(pipeline: Any, files: AdapterFiles) -> str:
    return f"The adapter {files.place} does not fit the base, a {type(pipeline).__name__}"
