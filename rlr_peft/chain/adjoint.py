"""Backpropagation through a stretch of the chain with one denoiser step on the tape.

The latents of the whole chain are stored, so a stretch can be differentiated step by step from its clean end: replay
one step, pull the cotangent back into the parameters and into that step's input, drop the tape, go on to the next.
Peak memory is one denoiser step, whatever the number of steps, and the gradient is that of plain backpropagation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rlr_peft.chain.interface import Chain
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.errors import UserError


class DerivativeError(UserError, FloatingPointError):
    """A derivative is not finite."""


@dataclass(frozen=True)
class Segment:
    """A stretch of the chain to differentiate.

    Its gradient is that of ``weight * < cotangent, x_{first_step - 1}(x_{first_step + length - 1}) >``.

    Attributes:
        first_step: the step nearest to the image, in 1..T; the walk goes up in t from here.
        length: number of steps; the input of the last one is held fixed.
        cotangent: derivative of the objective with respect to the mean of ``first_step``, (B, ...).
        weight: factor of the whole segment, such as 1 / q for a segment drawn with probability q.
    """

    first_step: int
    length: int
    cotangent: torch.Tensor
    weight: float = 1.0

    @property
    def steps(self) -> range:
        """The steps t that the segment differentiates."""
        return range(self.first_step, self.first_step + self.length)


def walk(chain: Chain, trajectory: Trajectory, segment: Segment) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yields ``(t, gradients)`` for every step of the segment, gradients in the order of ``chain.parameters``.

    Raises:
        ValueError: the segment leaves the chain.
        DerivativeError: a cotangent is not finite.
    """
    if segment.first_step < 1 or segment.length < 1 or segment.steps[-1] > trajectory.num_steps:
        raise ValueError(
            f"Expected a segment within steps 1..{trajectory.num_steps}, got steps "
            f"{segment.first_step}..{segment.first_step + segment.length - 1}."
        )
    cotangent = segment.weight * segment.cotangent
    for t in segment.steps:
        gradients, next_cotangent = pull_back(chain, trajectory, t, cotangent, into_latents=t != segment.steps[-1])
        yield t, gradients
        if next_cotangent is not None:
            cotangent = next_cotangent


def pull_back(
    chain: Chain, trajectory: Trajectory, t: int, cotangent: torch.Tensor, into_latents: bool = True
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Vector-Jacobian product of step t: from a cotangent at its mean to the parameters and to its input x_t.

    Returns:
        One gradient per parameter, and the cotangent at x_t, (B, ...), if ``into_latents``.
    """
    latents = trajectory.latents[t].detach().requires_grad_(into_latents)
    parameters = list(chain.parameters)
    with torch.enable_grad():
        mean = chain.replay(trajectory, t, latents).mean
    inputs = [*parameters, latents] if into_latents else parameters
    gradients = scaled_gradients(mean, inputs, cotangent, f"step {t}")
    return gradients[: len(parameters)], gradients[-1] if into_latents else None


def run(chain: Chain, trajectory: Trajectory, segment: Segment) -> float:
    """Adds the segment's gradient, of the objective to be maximised, to ``.grad`` of the chain's parameters.

    Returns:
        The Euclidean norm of the gradient that was added.
    """
    total = [torch.zeros_like(parameter) for parameter in chain.parameters]
    for _, gradients in walk(chain, trajectory, segment):
        for summed, gradient in zip(total, gradients, strict=True):
            summed.add_(gradient)
    add_to_gradients(chain, total)
    return float(torch.stack([gradient.norm() for gradient in total]).norm())


def add_to_gradients(chain: Chain, gradients: list[torch.Tensor]) -> None:
    """Adds one tensor per parameter to the parameters' ``.grad``."""
    for parameter, gradient in zip(chain.parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def scaled_gradients(
    output: torch.Tensor, inputs: Sequence[torch.Tensor], cotangent: torch.Tensor, place: str
) -> list[torch.Tensor]:
    """Vector-Jacobian product whose backward pass starts from the cotangent scaled to about 1.

    The scale is a power of two and undone exactly: half precision neither underflows nor needs a loss scaler.

    Args:
        output: end of a tape.
        inputs: what to differentiate by; those that the tape does not reach get zeros.
        cotangent: derivative by ``output``, of its shape.
        place: named in the error.

    Raises:
        DerivativeError: the cotangent is not finite.
    """
    largest = float(cotangent.abs().max())
    if not math.isfinite(largest):
        raise DerivativeError(
            f"Expected finite derivatives at {place}, got {largest}. Lower the learning rate, clip the reward, or "
            "train in bf16 or fp32; the last checkpoint is untouched."
        )
    scale = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0
    gradients = torch.autograd.grad(
        output, inputs, (cotangent / scale).to(output.dtype), allow_unused=True, materialize_grads=True
    )
    return [gradient * scale for gradient in gradients]
