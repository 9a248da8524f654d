"""Finds the layers of a base that an adapter's names speak of, in every spelling that is in use."""

import re
from typing import Any

from torch import nn

from rlr_peft.lora.export import SECOND_EXPERT

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

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
        pipeline: the base.
        second_expert: whether `transformer` means the second denoiser, as in the file of its folder.

    Attributes:
        layers: linear layers and convolutions by `model.name`, such as `unet.mid_block.attentions.0.proj_in`.
    """

    def __init__(self, pipeline: Any, *, second_expert: bool = False) -> None:
        self.layers: dict[str, nn.Module] = {}
        self._full_names: dict[str, str] = {}
        parts = [(name, part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
        # A name without its model is the denoiser's, if that has such a layer.
        for part_name, part in sorted(parts, key=lambda item: item[0] not in ("unet", "transformer", SECOND_EXPERT)):
            label = part_name
            if second_expert and part_name in ("transformer", SECOND_EXPERT):
                label = "transformer" if part_name == SECOND_EXPERT else ""
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
