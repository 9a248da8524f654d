"""Values of small tensors on the meta device, where they follow from the host: code may look at them.

Pipelines look at masks to cut off padding, at token ids, and at timesteps to choose between experts. A meta tensor has
no values, but these come from the host, where the same operations can be done beside; what depends on weights or images
stays without values.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

# Masks, token ids and timesteps are small; of larger tensors, such as latents, nothing is remembered.
LARGEST = 8192  # elements
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class KnownValues(TorchFunctionMode):
    """Inside, meta tensors that were made of host values alone keep these beside, as far as they are small.

    Looking at such a tensor (`item`, `bool`, `tolist`, `nonzero`, indexing with a mask) gives what a real device would.
    Where nothing is known it fails as ever. Tensors that require grad are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: Any = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function on the tensors, and on their values where all are known."""
        kwargs = kwargs or {}
        if func in INDEXING:
            args = (args[0], self._places(args[1]), *args[2:])
        on_host = None if self._is_unknown(args, kwargs) else self._on_host(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            if on_host is None:
                raise
            if func is Tensor.cpu or any(_names(leaf, "cpu") for leaf in tree_leaves((args, kwargs))):
                return on_host[0]
            result = tree_map(_without_values, on_host[0])
        if func is Tensor.__iter__ and on_host is not None:
            return self._rows(args[0], on_host[0])
        if on_host is None:
            self._forget_changed(func, args)
        elif func is not Tensor.__setitem__:
            self._remember(result, on_host[0])
        return result

    def _is_unknown(self, args: Any, kwargs: Any) -> bool:
        """Whether values are missing, or no meta tensor is concerned at all."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(tensor.is_meta for tensor in tensors) and not any(_names(leaf, "meta") for leaf in leaves):
            return True
        return any(
            tensor.requires_grad or tensor.numel() > LARGEST or (tensor.is_meta and tensor not in self._values)
            for tensor in tensors
        )

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The function's result on the values; None where the host cannot tell."""

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_meta:
                return self._values[leaf]
            return torch.device("cpu") if _names(leaf, "meta") else leaf

        try:
            return (func(*tree_map(value, args), **tree_map(value, kwargs)),)
        except (RuntimeError, NotImplementedError, IndexError, TypeError):
            return None

    def _remember(self, result: Any, values: Any) -> None:
        for made, value in zip(tree_leaves(result), tree_leaves(values), strict=False):
            fits = isinstance(made, Tensor) and isinstance(value, Tensor) and made.shape == value.shape
            if fits and made.is_meta and made.numel() <= LARGEST and not value.is_meta:
                self._values[made] = value

    def _rows(self, tensor: Tensor, values: Iterator[Tensor]) -> Iterator[Tensor]:
        for row, value in zip(tensor.unbind(0), values, strict=True):
            self._remember(row, value)
            yield row

    def _forget_changed(self, func: Any, args: Any) -> None:
        """What was changed in place by something unknown is unknown."""
        name = getattr(func, "__name__", "")
        changes = func is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__"))
        if changes and args and isinstance(args[0], Tensor):
            self._values.pop(args[0], None)

    def _places(self, index: Any) -> Any:
        """An index in which masks that are known are the places where they are true."""
        parts = index if isinstance(index, tuple) else (index,)
        places: list[Any] = []
        for part in parts:
            if isinstance(part, Tensor) and part.is_meta and part.dtype == torch.bool and part in self._values:
                places += [_without_values(place) for place in self._values[part].nonzero(as_tuple=True)]
            else:
                places.append(part)
        return tuple(places) if isinstance(index, tuple) or len(places) != 1 else places[0]


def _names(leaf: Any, device: str) -> bool:
    return (isinstance(leaf, torch.device) and leaf.type == device) or (isinstance(leaf, str) and leaf == device)


def _without_values(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
