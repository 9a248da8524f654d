"""Follows every tensor that is made, also where tensors have no bytes: the peak of a phase before it ever runs."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
