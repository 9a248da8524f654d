"""Counts bytes of tensors: those on autograd's tape, and all that live, also on the meta device."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TapeBytes:
    """The live and the peak number of bytes of tensors saved for backward passes.

    A storage counts once, however many operations saved it, and weights do not count: they are there anyway.

    Attributes:
        live: bytes held now.
        peak: the most bytes ever held at once.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._holders: Counter[int] = Counter()

    def hold(self, tensor: torch.Tensor) -> "_Saved":
        """Counts a tensor until the tape drops what is returned."""
        return _Saved(self, tensor)

    def add(self, storage: int, size: int) -> None:
        """One more holder of a storage."""
        if self._holders[storage] == 0:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[storage] += 1

    def drop(self, storage: int, size: int) -> None:
        """One holder less."""
        self._holders[storage] -= 1
        if self._holders[storage] == 0:
            self.live -= size


class _Saved:
    """A tensor on the tape; it counts as long as the tape holds it."""

    def __init__(self, tape: TapeBytes, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        owner = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage()
        # By the storage itself, not its address: on the meta device all addresses are 0.
        self._place = None if isinstance(owner, torch.nn.Parameter) else (storage._cdata, storage.nbytes())
        self._tape = tape
        if self._place is not None:
            tape.add(*self._place)

    def __del__(self) -> None:
        if self._place is not None:
            self._tape.drop(*self._place)


@contextmanager
def counted_tape() -> Iterator[TapeBytes]:
    """Counts what is saved for backward passes inside."""
    tape = TapeBytes()

    def unpack(saved: Any) -> torch.Tensor:
        return saved.tensor

    with torch.autograd.graph.saved_tensors_hooks(tape.hold, unpack):
        yield tape


class LiveMemory(TorchDispatchMode):
    """Bytes of the meta tensors made inside that still live, and the most at once.

    A storage counts once, however many views it has. What was there before (weights, inputs) does not count. Memory
    that a kernel takes and gives back within one operation is not seen.

    Attributes:
        live: bytes now.
        peak: the most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it made."""
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._meet(tensor, is_new=True)
        return result

    def _meet(self, tensor: Any, is_new: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:  # the host's memory is another matter
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if is_new else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention on the meta device saves what a GPU's fused kernels save.

    torch takes the plain formula there, whose matrix of all pairs of tokens no GPU kernel ever stores.
    """
    original = F.scaled_dot_product_attention

    def fused(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.device.type != "meta" or query.ndim != 4 or enable_gqa:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        bias = attn_mask
        if bias is not None:
            bias = torch.empty_like(bias, dtype=query.dtype) if bias.dtype == torch.bool else bias
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
