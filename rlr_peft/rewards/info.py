"""Info: numbers that a reward returns beside its scores, `(scores, info)`; they are logged and never trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from rlr_peft.foreign_text import one_line

# Name -> (B,) float32 on the CPU; NaN where a sample has no such number.
Info = dict[str, Tensor]


def without_info(returned: Any) -> Any:
    """The scores of `scores` or `(scores, info)`; a tuple of two plain scores stays what it is."""
    return returned[0] if _is_pair(returned) else returned


def info_of(returned: Any, batch_size: int) -> Info:
    """The info of `scores` or `(scores, info)`, as one number per sample.

    Args:
        returned: what a reward returned. Info is a mapping of names to one number, or to B numbers; or a list of B
            mappings of names to numbers, one per sample. Anything that is no number (text, images) is left out.
        batch_size: B.

    Returns:
        Printable name -> (B,) float32, detached, on the CPU; NaN where a sample has no such number.
    """
    info = returned[1] if _is_pair(returned) else None
    if isinstance(info, list):
        if len(info) != batch_size:
            return {}
        names = dict.fromkeys(name for entry in info for name in entry)
        info = {name: [_number(entry.get(name)) for entry in info] for name in names}
    # A server's names go into logs, tables and figures.
    numbers = {one_line(str(name)): _numbers(value, batch_size) for name, value in (info or {}).items()}
    return {name: values for name, values in numbers.items() if values is not None and not values.isnan().all()}


def join_info(parts: Iterable[tuple[Info, int]]) -> Info:
    """The info of a batch from those of its parts, given with their sizes; a name may be missing in some."""
    kept = list(parts)
    names = dict.fromkeys(name for info, _ in kept for name in info)
    return {name: torch.cat([info.get(name, torch.full((size,), math.nan)) for info, size in kept]) for name in names}


def mean_over_frames(info: Info, num_frames: int) -> Info:
    """The info of (B,) videos from that of their (B * F,) frames, frames of a video side by side."""
    return {name: values.reshape(-1, num_frames).nanmean(1) for name, values in info.items()}


def info_means(info: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of every name's numbers; what is not finite does not count."""
    finite = {name: values[values.isfinite()] for name, values in info.items()}
    return {name: float(values.mean()) for name, values in finite.items() if len(values)}


def unusual_kind(tensor: Tensor) -> str | None:
    """What keeps a tensor's numbers from being read as they are, in a word; None for a plain one."""
    kinds = {"nested": tensor.is_nested, "meta": tensor.is_meta, "quantized": tensor.is_quantized}
    kinds["sparse"] = tensor.layout is not torch.strided
    return next((kind for kind, is_so in kinds.items() if is_so), None)


def _is_pair(returned: Any) -> bool:
    if not isinstance(returned, tuple) or len(returned) != 2:
        return False
    info = returned[1]
    is_list_of_mappings = isinstance(info, list) and all(isinstance(entry, Mapping) for entry in info)
    return info is None or isinstance(info, Mapping) or is_list_of_mappings


def _numbers(value: Any, batch_size: int) -> Tensor | None:
    if isinstance(value, Tensor):
        if unusual_kind(value) is not None:
            return None
        value = value.detach().float().cpu().numpy()
    elif isinstance(value, (list, tuple)):
        value = [_number(entry) for entry in value]
    try:
        # A copy, as of the scores: the reward may fill the same buffer again.
        numbers = torch.as_tensor(numpy.array(value, dtype=numpy.float32))
    except Exception:  # objects of a user's class may raise anything when they are asked for a number
        return None
    if numbers.ndim == 0:
        return numbers.repeat(batch_size)
    return numbers if tuple(numbers.shape) == (batch_size,) else None


def _number(value: Any) -> float:
    if isinstance(value, (bool, int, float, numpy.integer, numpy.floating, numpy.bool_)):
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            return math.nan
    if isinstance(value, Tensor) and unusual_kind(value) is not None:
        return math.nan
    if isinstance(value, (Tensor, numpy.ndarray)) and value.ndim == 0:
        return _number(value.item())
    return math.nan
