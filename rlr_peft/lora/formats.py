"""What an adapter file says, layer by layer: kohya's, diffusers', peft's and LyCORIS' spellings, read into one form.

The settings beside the tensors, as diffusers and peft write them, give every layer its rank and alpha.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from rlr_peft.chain.families import adapter_prefix
from rlr_peft.lora.files import AdapterFormatError

# How a tensor's name ends: the layer, and which of its tensors this is. Between `lora_A` and `weight` peft may put the
# adapter's name.
_SPELLINGS = tuple(
    re.compile(rf"(?P<layer>.+?){ending}$")
    for ending in (
        r"[._]lora_(?P<role>A|B|down|up|mid)(?:\.[\w-]+)?\.weight",
        r"[._]lora_(?:B|up)(?:\.[\w-]+)?\.(?P<role>bias)",
        r"[._]lora(?:_linear_layer)?\.(?P<role>down|up)\.weight",
        r"(?:_lora)(?P<number>\d)\.(?P<role>down|up)\.weight",  # XLabs' FLUX
        r"\.(?P<role>alpha|dora_scale)",
        r"\.(?P<role>lora_magnitude_vector)(?:\.[\w-]+)?",
        r"\.(?P<role>(?:hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))(?:\.default)?",
    )
)
_ROLES = {"A": "down", "B": "up", "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"}


@dataclass
class AdapterLayer:
    """The adapter of one layer: it adds `alpha / rank * up @ down` to the layer's weights.

    Attributes:
        name: the layer, as the file spells it.
        down: (rank, inputs) or (rank, inputs, kernel height, kernel width).
        up: (outputs, rank) or (outputs, rank, 1, 1).
        alpha: of the product's scale; None where the file names none, which means rank.
        file_rank: the rank that alpha is divided by; differs from that of `down` where LoHa or LoKr was converted. None
            where alpha means nothing (a LoKr of two whole matrices).
        magnitude: DoRA's, as the file shapes it; None without.
        magnitude_key: its name in the file.
        bias: (outputs,), which is scaled and added to the outputs; None without.
        keys: names of `down`, `up` and `alpha` in the file, where they stand there as they are.
        rank_stabilised: alpha is divided by the square root of the rank (rsLoRA).
    """

    name: str
    down: Tensor
    up: Tensor
    alpha: float | None
    file_rank: int | None
    magnitude: Tensor | None = None
    magnitude_key: str = ""
    bias: Tensor | None = None
    keys: dict[str, str] = field(default_factory=dict)
    rank_stabilised: bool = False

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        if self.alpha is None or self.file_rank is None:
            return 1.0
        return self.alpha / self._divisor(self.file_rank)

    @property
    def lora_alpha(self) -> float:
        """The alpha that gives this scale at the rank of `down`."""
        same = self.alpha is not None and self.file_rank == self.rank
        return self.alpha if same and self.alpha is not None else self.scale * self._divisor(self.rank)

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rank_stabilised else rank

    def squared_change(self) -> float:
        """Squared Frobenius norm of what is added to the weights."""
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        return self.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())

    def kohya(self) -> dict[str, Tensor]:
        """Its product as the tensors of a plain LoRA under the file's names, for diffusers' conversions."""
        tensors = {
            self.keys.get("down", f"{self.name}.lora_down.weight"): self.down,
            self.keys.get("up", f"{self.name}.lora_up.weight"): self.up,
        }
        if self.alpha is not None:
            tensors[self.keys.get("alpha", f"{self.name}.alpha")] = torch.tensor(self.scale * self.rank)
        return tensors


def layers_of(tensors: dict[str, Tensor], place: str) -> list[AdapterLayer]:
    """Every layer that the file adapts; every tensor is accounted for.

    LoHa, LoKr and the middle matrix of LoCon are multiplied out into plain LoRA, exactly up to rounding: a Hadamard
    product of ranks r and s is a product of rank r s, and so is a Kronecker product.

    Args:
        tensors: of `read_tensors`.
        place: what the user called the file, for messages.

    Raises:
        AdapterFormatError: a tensor that belongs to no layer's LoRA, a layer that lacks one, or shapes that contradict
            each other.
    """
    roles: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, dict[str, str]] = {}
    for key, tensor in tensors.items():
        match = next((match for spelling in _SPELLINGS if (match := spelling.match(key))), None)
        if match is None:
            raise AdapterFormatError(
                f"The adapter {place}: expected tensors of a LoRA alone, got also {key}, which is none and would be "
                "lost; take an adapter without it."
            )
        layer = match["layer"].replace(".processor.", ".") + (match.groupdict().get("number") or "")
        role = _ROLES.get(match["role"], match["role"])
        if role in roles.setdefault(layer, {}):
            raise AdapterFormatError(
                f"The adapter {place}: expected one adapter, got two tensors for the same place, {keys[layer][role]} "
                f"and {key}; take a file with one."
            )
        roles[layer][role] = tensor
        keys.setdefault(layer, {})[role] = key
    return [_layer(name, found, keys[name], place) for name, found in roles.items()]


def format_name(names: Iterable[str]) -> str:
    """What the spelling of these tensor names is called, for messages."""
    names = list(names)

    def any_has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    kinds = []
    if any_has(r"\.hada_"):
        kinds.append("LoHa")
    if any_has(r"\.lokr_"):
        kinds.append("LoKr")
    if any_has(r"\.dora_scale$|magnitude_vector"):
        kinds.append("DoRA")
    if any_has(r"lora_(?:B|up)(?:\.[\w-]+)?\.bias$"):
        kinds.append("biases")
    if any_has(r"^lora_(?:unet|te\d?|transformer)_"):
        spelling = "kohya's format"
    elif any_has(r"\.processor\."):
        spelling = "the old format of diffusers' attention processors"
    elif any_has(r"^(?:unet|transformer(?:_2)?|text_encoder(?:_\d)?)\."):
        spelling = "diffusers' format"
    elif any_has(r"^diffusion_model\."):
        spelling = "ComfyUI's format"
    else:
        spelling = "peft's format"
    return spelling + (f" with {' and '.join(kinds)}" if kinds else "")


def _layer(name: str, found: dict[str, Tensor], keys: dict[str, str], place: str) -> AdapterLayer:
    def broken(what: str) -> AdapterFormatError:
        return AdapterFormatError(f"The adapter {place}: {what} in its layer {name}; get it again.")

    alpha = found.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise broken(f"expected one number as alpha, got shape {tuple(alpha.shape)}")
    magnitude, bias = found.pop("magnitude", None), found.pop("bias", None)
    kinds = {role.split("_")[0] if "_" in role else "lora" for role in found}
    try:
        if kinds == {"hada"}:
            down, up, rank = _multiplied_loha(found)
        elif kinds == {"lokr"}:
            down, up, rank = _multiplied_lokr(found)
        elif kinds == {"lora"}:
            down, up, rank = _multiplied_locon(found)
        else:
            raise KeyError("down")
    except KeyError as error:
        have = ", ".join(sorted(keys.values()))[:200]
        raise broken(f"expected also {error.args[0]!r} beside {have}, got no such tensor") from None
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in found.items())
        raise broken(f"expected matrices that can be multiplied, got {shapes}") from error
    plain = kinds == {"lora"} and "mid" not in keys
    return AdapterLayer(
        name,
        down,
        up,
        None if alpha is None else float(alpha),
        rank,
        magnitude,
        keys.get("magnitude", ""),
        bias,
        {role: keys[role] for role in ("down", "up", "alpha") if role in keys} if plain else {},
    )


def _multiplied_locon(found: dict[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    down, up, mid = found["down"], found["up"], found.get("mid")
    if mid is not None:  # 1x1, kernel, 1x1: the first two are one convolution
        down = torch.einsum("rs...,si->ri...", mid.float(), down.float().flatten(1))
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] % up.shape[1]:  # fewer columns: a convolution in groups
        raise ValueError
    return down, up, down.shape[0]


def _multiplied_loha(found: dict[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    rank = found["hada_w1_b"].shape[0]
    first, second = (_matrices(found[f"hada_w{n}_a"], found[f"hada_w{n}_b"], found.get(f"hada_t{n}")) for n in (1, 2))
    # (sum_r a_ir b_rj) (sum_s c_is d_sj) = sum_rs (a_ir c_is) (b_rj d_sj)
    up = torch.einsum("ir,is->irs", first[0], second[0]).flatten(1)
    down = torch.einsum("rj,sj->rsj", first[1], second[1]).flatten(0, 1)
    return down, up, rank


def _multiplied_lokr(found: dict[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    factors: list[tuple[Tensor, Tensor]] = []
    rank: int | None = None
    for n in (1, 2):
        if f"lokr_w{n}" in found:
            whole = found[f"lokr_w{n}"].float().flatten(1)
            one = torch.eye(min(whole.shape))
            factors.append((one, whole) if whole.shape[0] <= whole.shape[1] else (whole, one))
        else:
            right = found[f"lokr_w{n}_b"]
            factors.append(_matrices(found[f"lokr_w{n}_a"], right, found.get(f"lokr_t{n}")))
            rank = right.shape[0]
    # kron(a b, c d) = kron(a, c) kron(b, d)
    (first_up, first_down), (second_up, second_down) = factors
    return torch.kron(first_down, second_down), torch.kron(first_up, second_up), rank


def _matrices(left: Tensor, right: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """(outputs, rank) and (rank, inputs and kernel); with a core of Tucker's form `left` stands on its side."""
    if core is None:
        return left.float(), right.float().flatten(1)
    inner = torch.einsum("ij...,jr->ir...", core.float(), right.float())
    return left.float().T, inner.flatten(1)


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
        prefix = part if f"{part}.r" in settings else adapter_prefix(part)
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


# What makes a search take a time that grows fast with the length of a name: peft searches with a file's own patterns.
_QUANTIFIER, _QUANTIFIED_GROUP = re.compile(r"(?<!\\d)[*+{]"), re.compile(r"\)\s*[*+?{]")
MOST_QUANTIFIERS = 2


def _apply(layers: Mapping[str, AdapterLayer], settings: Mapping[str, Any], in_base: Collection[str], who: str) -> None:
    unsupported = [key for key in _UNSUPPORTED if settings.get(key)]
    if unsupported:
        raise AdapterFormatError(f"{who}: expected plain LoRA, got {unsupported[0]}, which diffusers cannot load.")
    rank, ranks = _number(settings, "r", who, least=1), _numbers(settings, "rank_pattern", who, least=1)
    alpha = _number(settings, "lora_alpha" if "lora_alpha" in settings else "alpha", who)
    alphas = _numbers(settings, "alpha_pattern", who)
    for pattern in (*ranks, *alphas):
        if len(_QUANTIFIER.findall(pattern)) > MOST_QUANTIFIERS or _QUANTIFIED_GROUP.search(pattern):
            raise AdapterFormatError(
                f"{who}: expected names of layers as patterns, got {pattern[:60]!r}, whose search may never end; name "
                "the layers."
            )
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
