"""Gradients of every single sample of a batch, in one backward pass.

Every sample gets weights of its own, equal to all others': their gradients are those of the samples. The weights are
small, as an adapter's are, and the layers that have them do a product per sample instead of one for all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch.nn.functional import conv2d


def can_separate(model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]) -> bool:
    """Whether all are weights of linear layers or of plain convolutions in 2D, as LoRA's are."""
    return {layer.weight for layer in model.modules() if _is_separable(layer)}.issuperset(parameters)


def _is_separable(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear | torch.nn.Conv2d]:
    if isinstance(layer, torch.nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, torch.nn.Linear)


@contextmanager
def separate_weights(
    models: Sequence[torch.nn.Module], parameters: Sequence[torch.nn.Parameter], count: int
) -> Iterator[list[torch.nn.Parameter]]:
    """Inside, the models use weights of each sample's own, and no code that was compiled before.

    Args:
        models: what is called with a batch of ``count`` samples, or of several times as many, as guidance calls it:
            first all samples without prompt, then all with it.
        parameters: for which ``can_separate`` holds; every one gets a copy per sample.
        count: of samples.

    Yields:
        The copies, (count, ...) each, in the order of the parameters.
    """
    copies: dict[torch.Tensor, torch.nn.Parameter] = {
        weight: torch.nn.Parameter(weight.detach().expand(count, *weight.shape)) for weight in parameters
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

    def __call__(self, model: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next(iter((*arguments, *named.values())))
        self.samples = len(first)


def _forward(
    layer: torch.nn.Linear | torch.nn.Conv2d, weights: torch.Tensor, called: _Called, count: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer with weights (count, ...); what a model makes of one sample, such as frames, stays together."""

    def forward(batch: torch.Tensor) -> torch.Tensor:
        by_sample = batch.reshape(called.samples // count, count, -1, *batch.shape[1:])
        if isinstance(layer, torch.nn.Conv2d):
            return _convolve(layer, weights, by_sample).flatten(0, 2)
        product = torch.einsum("gnr...i,noi->gnr...o", by_sample, weights).flatten(0, 2)
        return product if layer.bias is None else product + layer.bias

    return forward


def _convolve(layer: torch.nn.Conv2d, weights: torch.Tensor, by_sample: torch.Tensor) -> torch.Tensor:
    """One group of channels for each sample: (g, count, r, C, H, W) to (g, count, r, O, H, W)."""
    guided, count, parts, *_ = by_sample.shape
    side_by_side = by_sample.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    kernels, bias = weights.flatten(0, 1), None if layer.bias is None else layer.bias.repeat(count)
    output = conv2d(side_by_side, kernels, bias, layer.stride, layer.padding, layer.dilation, groups=count)
    return output.reshape(guided, parts, count, layer.out_channels, *output.shape[2:]).transpose(1, 2)
