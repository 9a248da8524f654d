"""What a reward returned, turned into one finite number per image; or a message that says what is wrong with it.

Beside its scores a reward may return info, `(scores, info)`: numbers that are logged and never trained on.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.foreign_text import one_line

# An error message shows at most this many bad samples; the rest are counted.
MAX_SAMPLES_IN_MESSAGE = 4
MAX_PROMPT_LENGTH_IN_MESSAGE = 80
# Name -> (B,) float32 on the CPU; NaN where a sample has no such number.
Info = dict[str, Tensor]


def check_scores(reward_name: str, scores: Any, prompts: Sequence[str], *, attached_to: Tensor | None = None) -> Tensor:
    """Turn what a reward returned into (B,) finite float32 scores, or say exactly what is wrong with it.

    Args:
        reward_name: named in every message.
        scores: a tensor, a numpy array, or a list of numbers or 0-dim tensors, with one real number per prompt; or
            `(scores, info)` where info is a mapping, a list of mappings or None (it is dropped).
        prompts: the B prompts that were scored; named in every message.
        attached_to: images that the scores must carry a gradient to. Scores move to their device.

    Returns:
        (B,) float32; attached to the images' graph where the scores were.

    Raises:
        RewardError: not numbers, wrong shape, not finite in float32, or cut off from `attached_to`.
    """
    tensor = _as_tensor(reward_name, without_info(scores), prompts)
    expected = (len(prompts),)
    if tuple(tensor.shape) != expected:
        advice = "return one score per image"
        if tuple(tensor.shape) == (*expected, 1):
            advice = "drop the last dimension with `.squeeze(1)`"
        elif tensor.ndim == 0:
            advice = "do not average over the batch"
        raise RewardError(
            f"reward '{reward_name}': expected scores of shape {expected}, got {tuple(tensor.shape)}; {advice}. "
            f"The batch: {describe_samples(range(len(prompts)), prompts)}"
        )
    if tensor.is_complex():
        raise RewardError(
            f"reward '{reward_name}': expected real scores, got dtype {tensor.dtype}; return float32. "
            f"The batch: {describe_samples(range(len(prompts)), prompts)}"
        )
    # A copy: code that fills one buffer again and again would change the scores of earlier images.
    tensor = tensor.to(torch.float32, copy=True)
    finite = torch.isfinite(tensor.detach()).cpu()
    if not bool(finite.all()):
        bad = [index for index, good in enumerate(finite.tolist()) if not good]
        values = ", ".join(str(tensor[index].item()) for index in bad[:MAX_SAMPLES_IN_MESSAGE])
        raise RewardError(
            f"reward '{reward_name}': expected finite scores, got {values} for {len(bad)} of {len(prompts)} samples: "
            f"{describe_samples(bad, prompts)}. Look at these images and prompts: guard divisions, logarithms and "
            "square roots in the reward, and check that the images themselves are finite"
        )
    if attached_to is not None:
        tensor = tensor.to(attached_to.device)
        if not is_attached(tensor, attached_to):
            raise RewardError(
                f"reward '{reward_name}' says it is differentiable, but its scores carry no gradient to the images. "
                "Keep everything between images and scores in torch, without `.detach()`, `.item()`, `.numpy()`, PIL "
                "or `torch.no_grad()`; or declare it with `differentiable = False` on the callable. "
                f"The batch: {describe_samples(range(len(prompts)), prompts)}"
            )
    return tensor


def is_attached(scores: Tensor, images: Tensor) -> bool:
    """Whether backpropagation from `scores` reaches `images`, found by walking the graph (no gradient is computed).

    `scores.requires_grad` alone would not do: it is also true for a reward model whose own weights require grad but
    that looks at detached images.
    """
    if scores.grad_fn is None or not images.requires_grad:
        return False
    target = torch.autograd.graph.get_gradient_edge(images).node
    pending, seen = [scores.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is target:
            return True
        if node in seen:
            continue
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions if following is not None)
    return False


def describe_samples(indices: Sequence[int] | range, prompts: Sequence[str]) -> str:
    """The samples at `indices` for an error message: `sample 2 "a red star", sample 5 "..." and 3 more`."""
    shown = []
    for index in indices[:MAX_SAMPLES_IN_MESSAGE]:
        prompt = prompts[index]
        if len(prompt) > MAX_PROMPT_LENGTH_IN_MESSAGE:
            prompt = prompt[: MAX_PROMPT_LENGTH_IN_MESSAGE - 3] + "..."
        shown.append(f'sample {index} "{prompt}"')
    more = len(indices) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _as_tensor(reward_name: str, scores: Any, prompts: Sequence[str]) -> Tensor:
    """A tensor of any shape from what user code may return; list entries that are 0-dim tensors keep their graph."""
    if isinstance(scores, Tensor):
        return _plain(reward_name, scores)
    if isinstance(scores, (list, tuple)):
        entries = [_plain(reward_name, entry) if isinstance(entry, Tensor) else entry for entry in scores]
        if entries and all(isinstance(entry, Tensor) for entry in entries):
            if len({tuple(entry.shape) for entry in entries}) == 1:
                return torch.stack(entries)
            raise RewardError(f"reward '{reward_name}': the tensors in the returned list differ in shape")
        bad = [index for index, entry in enumerate(entries) if not _is_number(entry)]
        if bad and not all(isinstance(entries[index], (list, tuple, numpy.ndarray)) for index in bad):
            where = describe_samples([index for index in bad if index < len(prompts)], prompts)
            raise RewardError(
                f"reward '{reward_name}': expected numbers, got {_in_words(entries[bad[0]])} at position {bad[0]}; "
                f"return one float per image, or (scores, info). Bad: {where or 'beyond the batch'}"
            )
    try:
        if scores is not None:  # NumPy would take it for NaN
            return torch.as_tensor(numpy.asarray(scores, dtype=numpy.float64))
        raise TypeError
    except Exception:  # objects of a user's class may raise anything when they are asked for a number
        raise RewardError(
            f"reward '{reward_name}': expected a tensor, an array or a list of {len(prompts)} numbers, got "
            f"{type(scores).__name__} ({reprlib.repr(scores)}); return one float per image. "
            f"The batch: {describe_samples(range(len(prompts)), prompts)}"
        ) from None


def _plain(reward_name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it holds its numbers as most do."""
    found = unusual_kind(tensor)
    if found is not None:
        raise RewardError(
            f"reward '{reward_name}': expected a plain tensor of scores, got a {found} one; return a dense tensor of "
            "float32, one number per image"
        )
    return tensor


def _in_words(entry: Any) -> str:
    """Never the many lines of a large tensor."""
    if isinstance(entry, (Tensor, numpy.ndarray)):
        return f"{type(entry).__name__} of shape {tuple(entry.shape)}"
    return reprlib.repr(entry)


def _is_number(entry: Any) -> bool:
    # Strings are refused although float("0.5") would work: a reward that returns text is a mistake.
    if isinstance(entry, Tensor):
        return entry.ndim == 0
    if isinstance(entry, (bool, int, float, numpy.number, numpy.bool_)):
        return True
    return isinstance(entry, numpy.ndarray) and entry.ndim == 0 and numpy.issubdtype(entry.dtype, numpy.number)


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
