"""The settings beside an adapter's tensors, as diffusers and peft write them: rank and alpha of every layer."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from rlr_peft.lora.errors import AdapterFormatError
from rlr_peft.lora.export import SECOND_EXPERT
from rlr_peft.lora.formats import AdapterLayer

# What changes a layer's sum and is not in its tensors.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
# With these, `target_modules` does not say which layers are adapted.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def apply_settings(
    layers: Mapping[str, AdapterLayer],
    settings: Mapping[str, Any],
    place: str,
    *,
    of_base: Collection[str],
    prefixed: bool,
) -> None:
    """Gives every layer the alpha that the settings name for it.

    Args:
        layers: of one file, by the base's names, `model.name`; changed in place.
        settings: peft's `LoraConfig`, `LoHaConfig` or `LoKrConfig` as a dictionary; may be empty.
        place: what the user called the adapter, for messages.
        of_base: names of all layers of the base that can be adapted, `model.name`.
        prefixed: whether the settings stand under `unet.`, `text_encoder.` and so on.

    Raises:
        AdapterFormatError: they contradict the tensors.
    """
    for part in {name.split(".")[0] for name in layers}:
        prefix = part
        if part == SECOND_EXPERT and f"{part}.r" not in settings:
            prefix = "transformer"
        own = _under(settings, f"{prefix}.") if prefixed else settings
        of_part = {
            name.removeprefix(f"{part}."): layer for name, layer in layers.items() if name.startswith(f"{part}.")
        }
        if own:
            in_base = {name.removeprefix(f"{part}.") for name in of_base if name.startswith(f"{part}.")}
            _apply(of_part, own, in_base, f"The adapter {place}, whose settings are of its {part}")
        for kind in ("magnitude", "bias"):
            missing = [name for name, layer in of_part.items() if getattr(layer, kind) is None]
            if 0 < len(missing) < len(of_part):
                raise AdapterFormatError(
                    f"The adapter {place}: expected a {kind} in all layers of the {part} or in none, got none in "
                    f"{len(missing)} of {len(of_part)} ({missing[0]}, ...); it is not whole, get it again."
                )


def _under(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def _apply(layers: Mapping[str, AdapterLayer], settings: Mapping[str, Any], in_base: Collection[str], who: str) -> None:
    unsupported = [key for key in _UNSUPPORTED if settings.get(key)]
    if unsupported:
        raise AdapterFormatError(f"{who}: expected plain LoRA, got {unsupported[0]}, which diffusers cannot load.")
    rank, ranks = _number(settings, "r", who, least=1), _numbers(settings, "rank_pattern", who, least=1)
    alpha = _number(settings, "lora_alpha" if "lora_alpha" in settings else "alpha", who)
    alphas = _numbers(settings, "alpha_pattern", who)
    try:
        for name, layer in layers.items():
            said = ranks.get(get_pattern_key(list(ranks), name), rank)
            if layer.file_rank not in (said, None):
                raise AdapterFormatError(
                    f"{who}: expected the same rank in settings and tensors, got {said:g} and {layer.file_rank} in "
                    f"{name}; take the file and the settings of one adapter."
                )
            said_alpha = alphas.get(get_pattern_key(list(alphas), name), alpha)
            if layer.alpha not in (said_alpha, None):
                raise AdapterFormatError(
                    f"{who}: expected the same alpha in settings and tensors, got {said_alpha:g} and {layer.alpha:g} "
                    f"in {name}; take the file and the settings of one adapter."
                )
            layer.alpha, layer.file_rank = said_alpha, int(said)
            layer.rank_stabilised = settings.get("use_rslora") is True
    except re.error as error:
        raise AdapterFormatError(
            f"{who}: expected names of layers as patterns, got one that is none ({error})."
        ) from None
    for key, kind in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        has = any(getattr(layer, kind) is not None for layer in layers.values())
        if key in settings and bool(settings[key]) != has:
            raise AdapterFormatError(
                f"{who}: expected a {kind} in its layers with {key} = true and none with false, got "
                f"{str(bool(settings[key])).lower()} and {'some' if has else 'none'}; take the file and the settings "
                "of one adapter."
            )
    targets = settings.get("target_modules")
    if isinstance(targets, list) and not any(settings.get(key) for key in _NARROWING):
        _check_whole(layers, [str(target) for target in targets], in_base, who)


def _check_whole(layers: Iterable[str], targets: list[str], in_base: Collection[str], who: str) -> None:
    exact, endings = set(targets), tuple(f".{target}" for target in targets)
    lost = sorted({name for name in in_base if name in exact or name.endswith(endings)} - set(layers))
    if lost:
        raise AdapterFormatError(
            f"{who}: expected tensors for all target_modules, got none for {len(lost)} layers of the base ({lost[0]}, "
            "...): it is not whole, or of another base; get it again."
        )


def _number(settings: Mapping[str, Any], key: str, who: str, least: float = -math.inf) -> float:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise AdapterFormatError(f"{who}: expected a number as {key}, got {str(value)[:40]!r}; save the adapter again.")
    return value


def _numbers(settings: Mapping[str, Any], key: str, who: str, least: float = -math.inf) -> dict[str, float]:
    values = settings.get(key) or {}
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{who}: expected a table as {key}, got {str(values)[:40]!r}; save the adapter again.")
    return {name: _number(values, name, who, least) for name in values}
