"""What an adapter file says, layer by layer: kohya's, diffusers', peft's and LyCORIS' spellings, read into one form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlr_peft.lora.errors import AdapterFormatError

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
