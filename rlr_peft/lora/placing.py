"""Brings the layers of an adapter file and those of a base together, in every spelling of their names in use."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlr_peft.chain.families import DENOISERS, adapter_prefix, models_of
from rlr_peft.lora.adapter import ADAPTABLE
from rlr_peft.lora.files import AdapterFormatError, AdapterMismatchError
from rlr_peft.lora.formats import AdapterLayer, layers_of

# kohya's word for a model of the pipeline: `lora_te1_...`
_KOHYA = {
    "unet": ("unet",),
    "transformer": ("unet", "transformer"),
    "text_encoder": ("te", "te1"),
    "text_encoder_2": ("te2",),
    "text_encoder_3": ("te3",),
}
# diffusers' old names of a text encoder's projections
_OLD_TEXT_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class LayerNames:
    """The adaptable layers of a pipeline by all their names.

    Args:
        denoiser: what the adapter is for, where its keys do not say so; None where they do.

    Attributes:
        layers: linear layers and convolutions by `model.name`, such as `unet.mid_block.attentions.0.proj_in`.
    """

    def __init__(self, pipeline: Any, denoiser: str | None = None) -> None:
        self.layers: dict[str, nn.Module] = {}
        self._full_names: dict[str, str] = {}
        # A name without its model is the denoiser's, if that has such a layer.
        for part_name, part in sorted(models_of(pipeline).items(), key=lambda item: item[0] not in DENOISERS):
            label = part_name
            if denoiser is not None and part_name in (denoiser, adapter_prefix(denoiser)):
                label = adapter_prefix(denoiser) if part_name == denoiser else ""
            for name, module in part.named_modules():
                if isinstance(module, ADAPTABLE) and ".lora_" not in name and label:
                    self._add(label, name.removesuffix(".base_layer"), f"{part_name}.", module)

    def _add(self, label: str, name: str, prefix: str, module: nn.Module) -> None:
        full = prefix + name
        self.layers[full] = module
        names = [name]
        if label.startswith("text_encoder"):  # transformers has moved CLIP's layers up by one
            within = name.removeprefix("text_model.")
            names += [within if within != name else f"text_model.{name}"]
        for spelled in names:
            self._full_names.setdefault(f"{label}.{spelled}", full)
            self._full_names.setdefault(spelled, full)
            for word in _KOHYA.get(label, ()):
                self._full_names.setdefault(f"lora_{word}_{spelled.replace('.', '_')}", full)

    def find(self, name: str) -> str | None:
        """The layer `model.name` that the file calls `name`; None if the base has none of this name."""
        bare = re.sub(r"^(?:diffusion_model\.)|base_model\.model\.", "", name)
        head, _, last = bare.rpartition(".")
        spellings = [bare, f"{bare}.0"] if last == "to_out" else [bare]
        if last in _OLD_TEXT_ENCODER:
            spellings.append(f"{head}.{_OLD_TEXT_ENCODER[last]}")
        return next((self._full_names[spelled] for spelled in spellings if spelled in self._full_names), None)


# Width of the text features that a UNet's cross attention takes.
_TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
# Relative change of a sum of squares that float32 explains, and a lost tensor or scale does not.
_ROUNDING = 1e-5


def place_layers(
    pipeline: Any, names: LayerNames, layers: list[AdapterLayer], place: str, form: str
) -> dict[str, AdapterLayer]:
    """Finds the base's layer for each layer of the file, and gives the matrices its shapes.

    Args:
        place: what the user called the adapter, for messages.

    Returns:
        The layers by the base's names, `model.name`.

    Raises:
        AdapterMismatchError: a layer that the base does not have, or has in another size, or that cannot be converted.
        AdapterFormatError: two layers of the file are one of the base.
    """
    found = {layer.name: names.find(layer.name) for layer in layers}
    if None in found.values():
        layers = _converted_by_diffusers(pipeline, layers, place) or layers
        found = {layer.name: names.find(layer.name) for layer in layers}
    strangers = [name for name, full in found.items() if full is None]
    fits_not = f"The adapter {place} does not fit the base, a {type(pipeline).__name__}"
    if strangers:
        remedy = (
            "Take the base that it was trained on."
            if form.startswith("diffusers")
            else "It is of another base, or diffusers has no conversion of this format for this family: take the base "
            "that it was trained on, or the adapter in diffusers' format."
        )
        raise AdapterMismatchError(
            f"{fits_not}: {len(strangers)} of the {len(layers)} layers in the file, which is in {form}, have no place "
            f"in it ({', '.join(strangers[:2])}{', ...' if len(strangers) > 2 else ''}). {remedy}"
        )
    twice = [full for full, count in Counter(found.values()).items() if count > 1]
    if twice:
        spellings = " and ".join(name for name, full in found.items() if full == twice[0])
        raise AdapterFormatError(
            f"The adapter {place}: expected one adapter, got two for the layer {twice[0]} ({spellings}); take a "
            "file with one."
        )
    placed = {str(found[layer.name]): layer for layer in layers}
    of_inputs = [name for name, layer in placed.items() if _norms_of_inputs(layer)]
    if of_inputs:
        raise AdapterFormatError(
            f"The adapter {place}: expected a dora_scale with a norm for each output of a layer, got one for each "
            f"input in {of_inputs[0]}, which peft's DoRA does not know; merge it with the program that made it."
        )
    for name, layer in placed.items():
        problem = _fit(layer, names.layers[name])
        if problem is not None:
            raise AdapterMismatchError(
                f"{fits_not}: of {name} {problem}{_family(placed)}. Take the base that it was trained on."
            )
    return placed


def _family(placed: Mapping[str, AdapterLayer]) -> str:
    """What base the adapter is for, where the width of its text features tells."""
    widths = {
        layer.down.flatten(1).shape[1] for name, layer in placed.items() if re.search(r"unet\..*attn2\.to_[kv]$", name)
    }
    known = [_TEXT_WIDTHS[width] for width in widths if width in _TEXT_WIDTHS]
    return f"; it is for {known[0]}, by the width of its text features" if len(known) == 1 else ""


def _norms_of_inputs(layer: AdapterLayer) -> bool:
    """Whether the dora_scale is LyCORIS' older one, (1, inputs): peft knows one norm for each output alone."""
    magnitude = layer.magnitude
    return (
        layer.magnitude_key.endswith("dora_scale")
        and magnitude is not None
        and magnitude.shape[0] == 1 < magnitude.numel()
    )


def _fit(layer: AdapterLayer, module: Any) -> str | None:
    """Gives the adapter's matrices the shapes of the base's layer; says what is wrong if they have other sizes."""
    is_linear = isinstance(module, nn.Linear)
    outputs = module.out_features if is_linear else module.out_channels
    inputs = (module.in_features,) if is_linear else (module.in_channels, *module.kernel_size)
    columns = layer.rank if is_linear else layer.rank // module.groups
    shapes = (
        ("down", (layer.rank, *inputs)),
        ("up", (outputs, columns, *(1 for _ in inputs[1:]))),
        ("magnitude", (outputs,) if is_linear else (1, outputs, *(1 for _ in inputs[1:]))),
        ("bias", (outputs,)),
    )
    for attribute, shape in shapes:
        tensor = getattr(layer, attribute)
        if tensor is None:
            continue
        if tensor.numel() != torch.Size(shape).numel():
            return f"the {attribute} matrix has shape {tuple(tensor.shape)} in the file and {shape} in the base"
        setattr(layer, attribute, tensor.reshape(shape).contiguous())
    return None


def _converted_by_diffusers(pipeline: Any, layers: list[AdapterLayer], place: str) -> list[AdapterLayer]:
    """The layers as diffusers' conversion of this family names, splits and joins them; empty where it has none.

    Whether all of it came through shows in the number of outputs that are changed and in the sum of the squares of all
    changes, which neither splitting nor joining nor another order of rows alters.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        return []
    for layer in layers:  # some conversions multiply alpha in, which would be rounded to the file's precision
        layer.down, layer.up = layer.down.float(), layer.up.float()
    plain = {key: tensor for layer in layers for key, tensor in layer.kohya().items()}
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    try:
        with quiet_diffusers():
            answer = pipeline.lora_state_dict(dict(plain), **options)
        converted = layers_of(answer[0] if isinstance(answer, tuple) else answer, place)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AdapterFormatError):
        return []  # the names that have no place are then told
    of_file = {layer.down.data_ptr(): layer for layer in layers}
    for layer in converted:
        original = of_file.get(layer.down.data_ptr())
        if original is not None and _is_same(original.up, layer.up):
            layer.alpha, layer.file_rank = original.alpha, original.file_rank
            layer.magnitude, layer.magnitude_key = original.magnitude, original.magnitude_key
            layer.bias = original.bias
    before, after = (sum(layer.squared_change() for layer in some) for some in (layers, converted))
    counts, kept = (
        (
            sum(layer.up.shape[0] for layer in some),
            sum((layer.magnitude is not None) + (layer.bias is not None) for layer in some),
        )
        for some in (layers, converted)
    )
    if abs(after - before) > _ROUNDING * before or counts != kept:
        raise AdapterMismatchError(
            f"The adapter {place} cannot be converted for the base, a {type(pipeline).__name__}, without loss: "
            f"expected {counts[0]} changed outputs, {before:.6g} as the sum of squares of the changes and {counts[1]} "
            f"tensors of DoRA or biases, got {kept[0]}, {after:.6g} and {kept[1]} from diffusers' conversion. Take the "
            "adapter in diffusers' format."
        )
    return converted


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keeps diffusers' loaders from logging what is checked or raised here anyway."""
    children = [logging.getLogger(f"diffusers.loaders.{name}") for name in ("peft", "lora_base", "lora_pipeline")]
    before = [child.level for child in children]
    for child in children:
        child.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for child, level in zip(children, before, strict=True):
            child.setLevel(level)
