"""Backpropagation through a stretch of the chain with one denoiser step on the tape.

The latents of the whole chain are stored, so a stretch can be differentiated step by step from its clean end: replay
one step, pull the cotangent back into the parameters and into that step's input, drop the tape, go on to the next.
Peak memory is one denoiser step, whatever the number of steps, and the gradient is that of plain backpropagation.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import torch

from rlr_peft.chain.interface import Chain
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.errors import UserError


class DerivativeError(UserError, FloatingPointError):
    """A derivative is not finite."""


# What goes into the parameters at a step: ``(t, mean, travelling cotangent) -> (cotangent, numbers for the logs)``.
IntoParameters = Callable[[int, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, Mapping[str, float]]]


# What of a step is differentiated.
Output = Literal["mean", "pred_original_sample"]


@dataclass(frozen=True)
class Segment:
    """A stretch of the chain to differentiate: what every gradient estimator is made of.

    Its gradient is that of ``weight * < cotangent, x_{first_step - 1}(x_{first_step + length - 1}) >``.

    Attributes:
        term: the name of the estimator's term, for the logs.
        first_step: the step nearest to the image, in 1..T; the walk goes up in t from here.
        length: number of steps; the input of the last one is held fixed.
        cotangent: derivative of the objective with respect to the mean of ``first_step``, (B, ...); None for a segment
            of one step whose ``into_parameters`` makes it of the step's present mean.
        weight: factor of the whole segment, such as 1 / q for a segment drawn with probability q.
        into_parameters: makes the cotangent that goes into the parameters, before the weight, where it is another than
            the one that travels on. Where it returns another tensor, a step costs two backward passes.
        of: what a segment of one step differentiates: the step's mean or its prediction of x_0.
        score_steps: steps at which noise divided by its std goes into the parameters.
        note: plain values for the estimator, which finds them in the segment's booking.
    """

    term: str
    first_step: int
    length: int
    cotangent: torch.Tensor | None
    weight: float = 1.0
    into_parameters: IntoParameters | None = None
    of: Output = "mean"
    score_steps: tuple[int, ...] = ()
    note: Any = None

    def __post_init__(self) -> None:
        if self.cotangent is None and (self.into_parameters is None or self.length != 1):
            raise ValueError("Expected a cotangent, or into_parameters for a segment of one step, got neither.")

    @property
    def steps(self) -> range:
        """The steps t that the segment differentiates."""
        return range(self.first_step, self.first_step + self.length)


@dataclass(frozen=True)
class WalkedStep:
    """One step of a segment, differentiated.

    Attributes:
        t: the step.
        cotangent: that travelled to the step's mean, (B, ...); None if there is none.
        gradients: one per parameter, before the segment's weight.
        probed: gradients of the probe's cotangent, where one was asked for.
        backward_passes: through the step, the probe's not counted.
        numbers: of ``into_parameters``, for the logs.
    """

    t: int
    cotangent: torch.Tensor | None
    gradients: list[torch.Tensor]
    probed: list[torch.Tensor] | None
    backward_passes: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Booking:
    """What came of a segment: the one place where its norm and its costs are written down.

    Attributes:
        term, first_step, length, weight, note: the segment's.
        norm: Euclidean norm of the gradient that was added, summed over the batch's samples, weight included.
        backward_passes: through a denoiser step, per sample.
        cotangent_squares: squared norm of the cotangent that travelled to every step, summed over samples, float64.
        numbers: for the logs, means over the segment's steps.
    """

    term: str
    first_step: int
    length: int
    weight: float
    norm: float
    backward_passes: int = 0
    cotangent_squares: tuple[float, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    note: Any = None


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
        self, cotangent: torch.Tensor, *, of: Output = "mean", keep: bool = False
    ) -> list[torch.Tensor]:
        """One gradient per parameter; ``keep`` leaves the tape for another call."""
        return self._pull_back(self._parameters, cotangent, of, keep)

    def into_latents(self, cotangent: torch.Tensor, *, keep: bool = False) -> torch.Tensor:
        """The cotangent at the step's input x_t, (B, ...)."""
        return self._pull_back([self.latents], cotangent, "mean", keep)[0]

    def into_both(self, cotangent: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Both of the above in one backward pass."""
        *gradients, into_latents = self._pull_back([*self._parameters, self.latents], cotangent, "mean", keep=False)
        return gradients, into_latents

    def _pull_back(
        self, inputs: Sequence[torch.Tensor], cotangent: torch.Tensor, of: Output, keep: bool
    ) -> list[torch.Tensor]:
        output = self.mean if of == "mean" else self.pred_original_sample
        return scaled_gradients(output, inputs, cotangent, self._place, keep)


def walk(
    chain: Chain, trajectory: Trajectory, segment: Segment, probe: Callable[[int], torch.Tensor | None] | None = None
) -> Iterator[WalkedStep]:
    """Differentiates a segment step by step; its weight is left to ``run``.

    Args:
        chain: the chain.
        trajectory: what was sampled.
        segment: of it.
        probe: gives another cotangent at the mean of a step, (B, ...) or None, to be pulled back on the same tape.

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
        travelled, probed = cotangent, None
        if probe is not None and (probing := probe(t)) is not None:
            probed = step.into_parameters(probing, keep=True)
        own, numbers = _into_parameters(segment, t, step.mean.detach(), cotangent)
        in_one_pass = own is cotangent and not is_last
        if in_one_pass:
            gradients, cotangent = step.into_both(own)
        else:
            gradients = step.into_parameters(own, of=segment.of, keep=not is_last)
            if cotangent is not None and not is_last:
                cotangent = step.into_latents(cotangent)
        del step  # before the next is replayed: the second pass frees no tape that leads to parameters alone
        yield WalkedStep(t, travelled, gradients, probed, 1 if in_one_pass or is_last else 2, numbers)


def _into_parameters(
    segment: Segment, t: int, mean: torch.Tensor, cotangent: torch.Tensor | None
) -> tuple[torch.Tensor, Mapping[str, float]]:
    if segment.into_parameters is not None:
        return segment.into_parameters(t, mean, cotangent)
    assert cotangent is not None  # as a segment without into_parameters has one
    return cotangent, {}


def run(chain: Chain, trajectory: Trajectory, segment: Segment) -> Booking:
    """Adds the segment's gradient, of the objective to be maximised, to ``.grad`` of the chain's parameters."""
    total = [torch.zeros_like(parameter) for parameter in chain.parameters]
    passes = 0
    squares: list[float] = []
    numbers: defaultdict[str, list[float]] = defaultdict(list)
    for step in walk(chain, trajectory, segment):
        for summed, gradient in zip(total, step.gradients, strict=True):
            summed.add_(gradient, alpha=segment.weight)
        passes += step.backward_passes
        if step.cotangent is not None:
            squares.append(float(step.cotangent.double().square().sum()))
        for name, value in step.numbers.items():
            numbers[name].append(value)
    return Booking(
        segment.term,
        segment.first_step,
        segment.length,
        segment.weight,
        add_to_gradients(chain, total),
        passes,
        tuple(squares),
        {name: fmean(values) for name, values in numbers.items()},
        segment.note,
    )


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
