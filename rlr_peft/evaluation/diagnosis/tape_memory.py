"""Counts the bytes that autograd's tape holds, for machines whose allocator does not keep the peak."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
