"""Forwards that stand in for the denoisers' own for a while: negative branch off the tape, weights per sample."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.functional import conv2d

from rlr_peft.chain.families import NegativeBranch


class DetachedNegative:
    """Takes the negative branch off the tape: half of what a step keeps for its backward pass, and half of that pass.

    A doubled batch is run half by half, in the same way with and without gradients: a replayed step repeats the sampled
    one bit for bit, and both equal the undivided batch up to rounding.

    Args:
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


def can_separate(model: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether all are weights of linear layers or of plain convolutions in 2D, as LoRA's are."""
    return {layer.weight for layer in model.modules() if _is_separable(layer)}.issuperset(parameters)


def _is_separable(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


@contextmanager
def separate_weights(
    models: Sequence[nn.Module], parameters: Sequence[nn.Parameter], count: int
) -> Iterator[list[nn.Parameter]]:
    """Inside, the models use weights of each sample's own, whose gradients are those of single samples.

    They are small, as an adapter's are; the layers that have them do a product per sample instead of one for all. No
    code is used that was compiled before.

    Args:
        models: what is called with a batch of ``count`` samples, or of several times as many, as guidance calls it:
            first all samples without prompt, then all with it.
        parameters: for which ``can_separate`` holds; every one gets a copy per sample.

    Yields:
        The copies, (count, ...) each, in the order of the parameters.
    """
    copies: dict[torch.Tensor, nn.Parameter] = {
        weight: nn.Parameter(weight.detach().expand(count, *weight.shape)) for weight in parameters
    }
    called = _Called()
    with ExitStack() as undo, torch.compiler.set_stance("force_eager"):
        for model in models:
            undo.callback(model.register_forward_pre_hook(called, prepend=True, with_kwargs=True).remove)
            for layer in filter(_is_separable, model.modules()):
                if layer.weight in copies:
                    layer.forward = _forward(layer, copies[layer.weight], called, count)  # type: ignore[method-assign, assignment]
                    undo.callback(delattr, layer, "forward")
        yield list(copies.values())


class _Called:
    """With how many samples a model was called last, a guided pair counting twice."""

    samples = 0

    def __call__(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next(iter((*arguments, *named.values())))
        self.samples = len(first)


def _forward(
    layer: nn.Linear | nn.Conv2d, weights: torch.Tensor, called: _Called, count: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer with weights (count, ...); what a model makes of one sample, such as frames, stays together."""

    def forward(batch: torch.Tensor) -> torch.Tensor:
        by_sample = batch.reshape(called.samples // count, count, -1, *batch.shape[1:])
        if isinstance(layer, nn.Conv2d):
            return _convolve(layer, weights, by_sample).flatten(0, 2)
        product = torch.einsum("gnr...i,noi->gnr...o", by_sample, weights).flatten(0, 2)
        return product if layer.bias is None else product + layer.bias

    return forward


def _convolve(layer: nn.Conv2d, weights: torch.Tensor, by_sample: torch.Tensor) -> torch.Tensor:
    """One group of channels for each sample: (g, count, r, C, H, W) to (g, count, r, O, H, W)."""
    guided, count, parts, *_ = by_sample.shape
    side_by_side = by_sample.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    kernels, bias = weights.flatten(0, 1), None if layer.bias is None else layer.bias.repeat(count)
    output = conv2d(side_by_side, kernels, bias, layer.stride, layer.padding, layer.dilation, groups=count)
    return output.reshape(guided, parts, count, layer.out_channels, *output.shape[2:]).transpose(1, 2)
