"""The negative branch of classifier-free guidance, run by itself and without a tape."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch
from torch import nn

NegativeBranch = Literal["first half", "second half", "second call"]
"""Where a pipeline runs the negative branch of a step: in a half of a doubled batch, or in a call of its own."""


class DetachedNegative:
    """Takes the negative branch off the tape: half of what a step keeps for its backward pass, and half of that pass.

    A doubled batch is run half by half, in the same way with and without gradients: a replayed step repeats the sampled
    one bit for bit, and both equal the undivided batch up to rounding.

    Args:
        denoisers: of the pipeline.
        place: where its calls put the negative branch.

    Attributes:
        ran: whether a single step inside the latest `off_tape` had a negative branch.
    """

    def __init__(self, denoisers: Sequence[nn.Module], place: NegativeBranch) -> None:
        self._denoisers = denoisers
        self._place = place
        self.ran = False

    @contextmanager
    def off_tape(self, batch_size: int) -> Iterator[None]:
        """Inside, the denoisers run the negative branch of so many samples without gradients."""
        self.ran = False
        wrap = self._by_turns if self._place == "second call" else self._by_halves
        own = [module.__dict__.get("forward") for module in self._denoisers]
        for module in self._denoisers:
            module.forward = wrap(module.forward, batch_size)
        try:
            yield
        finally:
            for module, forward in zip(self._denoisers, own, strict=True):
                del module.forward
                if forward is not None:  # a hook's
                    module.forward = forward

    def _by_turns(self, forward: Callable[..., Any], batch_size: int) -> Callable[..., Any]:
        is_negative = True

        @wraps(forward)
        def by_turns(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_negative
            is_negative = not is_negative
            self.ran |= is_negative
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_negative):
                return forward(*args, **kwargs)

        return by_turns

    def _by_halves(self, forward: Callable[..., Any], batch_size: int) -> Callable[..., Any]:
        @wraps(forward)
        def by_halves(*args: Any, **kwargs: Any) -> Any:
            latents = next(iter((*args, *kwargs.values())))
            if len(latents) != 2 * batch_size:  # no guidance
                return forward(*args, **kwargs)
            self.ran = True
            results = []
            for half in (0, 1):
                is_negative = half == (self._place == "second half")
                with torch.set_grad_enabled(torch.is_grad_enabled() and not is_negative):
                    results.append(forward(*(_half(value, half) for value in args), **_half(kwargs, half)))
            return _joined(*results)

        return by_halves


def _half(value: Any, half: int) -> Any:
    """A half of what has an entry for every sample: tensors and lists. Numbers, and tuples such as rotary embeddings,
    are the same for all samples."""
    if isinstance(value, Mapping):
        return {name: _half(entry, half) for name, entry in value.items()}
    if isinstance(value, list) or (torch.is_tensor(value) and value.ndim > 0):
        middle = len(value) // 2
        return value[middle:] if half else value[:middle]
    return value


def _joined(first: Any, second: Any) -> Any:
    """One result of two: a tuple of a single entry, or diffusers' output object."""
    if torch.is_tensor(first):
        return torch.cat([first, second])
    if isinstance(first, list):
        return first + second
    if isinstance(first, tuple):
        return tuple(_joined(*pair) for pair in zip(first, second, strict=True))
    return type(first)(**{name: _joined(first[name], second[name]) for name in first})
