"""Backpropagation through a stretch of the chain with one denoiser step on the tape.

The latents of the whole chain are stored, so a stretch can be differentiated step by step from its clean end: replay
one step, pull the cotangent back into the parameters and into that step's input, drop the tape, go on to the next.
Peak memory is one denoiser step, whatever the number of steps, and the gradient is that of plain backpropagation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rlr_peft.chain.interface import Chain
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.errors import UserError


class DerivativeError(UserError, FloatingPointError):
    """A derivative is not finite."""


# What goes into the parameters at step t instead of the cotangent that travels on: ``(t, mean, cotangent) -> tensor``.
IntoParameters = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """A stretch of the chain to differentiate.

    Its gradient is that of ``weight * < cotangent, x_{first_step - 1}(x_{first_step + length - 1}) >``.

    Attributes:
        first_step: the step nearest to the image, in 1..T; the walk goes up in t from here.
        length: number of steps; the input of the last one is held fixed.
        cotangent: derivative of the objective with respect to the mean of ``first_step``, (B, ...).
        weight: factor of the whole segment, such as 1 / q for a segment drawn with probability q.
        into_parameters: a different cotangent, at the mean of every step, for the parameters alone, before the weight;
            None for the one that travels. Where it returns another tensor, a step costs two backward passes.
    """

    first_step: int
    length: int
    cotangent: torch.Tensor
    weight: float = 1.0
    into_parameters: IntoParameters | None = None

    @property
    def steps(self) -> range:
        """The steps t that the segment differentiates."""
        return range(self.first_step, self.first_step + self.length)


class ReplayedStep:
    """One step of the chain on the tape, from where cotangents are pulled back, as often as needed.

    Args:
        chain: the chain.
        trajectory: what was sampled.
        t: the step.
        with_latents: whether cotangents will be pulled back into the step's input too.

    Attributes:
        latents: the step's input x_t, (B, ...).
        mean: of the step, (B, ...), on the tape.
        pred_original_sample: the prediction of x_0, (B, ...), on the tape.
    """

    def __init__(self, chain: Chain, trajectory: Trajectory, t: int, with_latents: bool = True) -> None:
        self._parameters = list(chain.parameters)
        self._place = f"step {t}"
        self.latents = trajectory.latents[t].detach().requires_grad_(with_latents)
        with torch.enable_grad():
            step = chain.replay(trajectory, t, self.latents)
        self.mean, self.pred_original_sample = step.mean, step.pred_original_sample

    def into_parameters(
        self, cotangent: torch.Tensor, *, output: torch.Tensor | None = None, keep: bool = False
    ) -> list[torch.Tensor]:
        """One gradient per parameter; ``keep`` leaves the tape for another call. ``output`` is the mean if None."""
        return self._pull_back(self._parameters, cotangent, output, keep)

    def into_latents(self, cotangent: torch.Tensor, *, keep: bool = False) -> torch.Tensor:
        """The cotangent at the step's input x_t, (B, ...)."""
        return self._pull_back([self.latents], cotangent, None, keep)[0]

    def into_both(self, cotangent: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Both of the above in one backward pass."""
        *gradients, into_latents = self._pull_back([*self._parameters, self.latents], cotangent, None, keep=False)
        return gradients, into_latents

    def _pull_back(
        self, inputs: Sequence[torch.Tensor], cotangent: torch.Tensor, output: torch.Tensor | None, keep: bool
    ) -> list[torch.Tensor]:
        return scaled_gradients(self.mean if output is None else output, inputs, cotangent, self._place, keep)


def walk(chain: Chain, trajectory: Trajectory, segment: Segment) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yields ``(t, gradients)`` for every step of the segment, gradients in the order of ``chain.parameters``.

    The segment's weight is left to ``run``.

    Raises:
        ValueError: the segment leaves the chain.
        DerivativeError: a cotangent is not finite.
    """
    if segment.first_step < 1 or segment.length < 1 or segment.steps[-1] > trajectory.num_steps:
        raise ValueError(
            f"Expected a segment within steps 1..{trajectory.num_steps}, got steps "
            f"{segment.first_step}..{segment.first_step + segment.length - 1}."
        )
    cotangent = segment.cotangent
    for t in segment.steps:
        is_last = t == segment.steps[-1]
        step = ReplayedStep(chain, trajectory, t, with_latents=not is_last)
        own = cotangent
        if segment.into_parameters is not None:
            own = segment.into_parameters(t, step.mean.detach(), cotangent)
        if own is cotangent and not is_last:
            gradients, cotangent = step.into_both(cotangent)
        else:
            gradients = step.into_parameters(own, keep=not is_last)
            if not is_last:
                cotangent = step.into_latents(cotangent)
        del step  # before the next is replayed: the second pass frees no tape that leads to parameters alone
        yield t, gradients


def run(chain: Chain, trajectory: Trajectory, segment: Segment) -> float:
    """Adds the segment's gradient, of the objective to be maximised, to ``.grad`` of the chain's parameters.

    Returns:
        The Euclidean norm of the gradient that was added.
    """
    total = [torch.zeros_like(parameter) for parameter in chain.parameters]
    for _, gradients in walk(chain, trajectory, segment):
        for summed, gradient in zip(total, gradients, strict=True):
            summed.add_(gradient, alpha=segment.weight)
    return add_to_gradients(chain, total)


def add_to_gradients(chain: Chain, gradients: list[torch.Tensor]) -> float:
    """Adds one tensor per parameter to the parameters' ``.grad``; returns their Euclidean norm."""
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    for parameter, gradient in zip(chain.parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return norm


def scaled_gradients(
    output: torch.Tensor, inputs: Sequence[torch.Tensor], cotangent: torch.Tensor, place: str, keep: bool = False
) -> list[torch.Tensor]:
    """Vector-Jacobian product whose backward pass starts from the cotangent scaled to about 1.

    The scale is a power of two and undone exactly: half precision neither underflows nor needs a loss scaler.

    Args:
        output: end of a tape.
        inputs: what to differentiate by; those that the tape does not reach get zeros.
        cotangent: derivative by ``output``, of its shape.
        place: named in the error.
        keep: leave the tape for another backward pass.

    Raises:
        DerivativeError: the cotangent is not finite.
    """
    largest = float(cotangent.abs().max())
    if not math.isfinite(largest):
        raise DerivativeError(
            f"Expected finite derivatives at {place}, got {largest}. Lower the learning rate, clip the reward, or "
            "train in bf16 or fp32; the last checkpoint is untouched."
        )
    if not output.requires_grad:  # of two experts the one that is not trained took this step
        return [torch.zeros_like(tensor) for tensor in inputs]
    scale = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0
    gradients = torch.autograd.grad(
        output,
        inputs,
        (cotangent / scale).to(output.dtype),
        retain_graph=keep,
        allow_unused=True,
        materialize_grads=True,
    )
    return [gradient * scale for gradient in gradients]
