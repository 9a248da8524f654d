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

from rlr_peft.chain.steps import Chain, PathPoint, Trajectory, leap
from rlr_peft.errors import UserError


class DerivativeError(UserError, FloatingPointError):
    """A derivative is not finite."""


# What goes into the parameters at a step: ``(t, mean, travelling cotangent) -> (cotangent, numbers for the logs)``.
IntoParameters = Callable[[int, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, Mapping[str, float]]]


# Where a replayed step leads: its mean, its prediction of x_0, or in one leap to the input of another step.
LeadsTo = Literal["mean", "prediction"] | int


@dataclass(frozen=True)
class Segment:
    """Steps of the chain to differentiate: what every gradient estimator is made of.

    Walked from the clean end. With c the cotangent at the mean of a step,

        into the parameters:    weight * w_t  J_theta^T c
        on to the next step:    a_t J_x^T c + (1 - a_t) A_t c

    where A_t is the step's derivative by its input with the flow velocity held fixed. With all w_t = a_t = 1 over
    neighbouring steps this is the gradient of ``weight * < cotangent, x_{first_step - 1}(x_{last step}) >``.

    Attributes:
        term: the name of the estimator's term, for the logs.
        steps: t in 1..T, rising; neighbours unless they are leaps.
        cotangent: derivative of the objective with respect to the mean of the first step, (B, ...); None for a segment
            of one step whose ``into_parameters`` makes it of the step's present mean.
        weight: factor of the whole segment, such as 1 / q for a segment drawn with probability q.
        sample_weights: w_t of every sample, (steps, B); None for 1. A sample is walked as far as its last weight that
            is not 0, so that the batch narrows: not for a chain that mixes samples.
        carry: a_t in [0, 1], (steps,); None for 1. Where it is 0 no gradient is taken by the step's input, and a step
            without weight is not replayed.
        into_parameters: makes the cotangent that goes into the parameters, before the weights, where it is another than
            the one that travels on. Where it returns another tensor, a step costs two backward passes.
        from_prediction: whether the cotangent is that of the first step's prediction of x_0 instead of its mean.
        leaps: whether every later step is taken as one deterministic leap to where the one before starts.
        trajectory: of other samples than the rollout's; None for these.
        score_steps: steps at which noise divided by its std goes into the parameters.
        note: plain values for the estimator, which finds them in the segment's booking.
    """

    term: str
    steps: Sequence[int]
    cotangent: torch.Tensor | None
    weight: float = 1.0
    sample_weights: torch.Tensor | None = None
    carry: Sequence[float] | None = None
    into_parameters: IntoParameters | None = None
    from_prediction: bool = False
    leaps: bool = False
    trajectory: Trajectory | None = None
    score_steps: tuple[int, ...] = ()
    note: Any = None

    def __post_init__(self) -> None:
        if self.cotangent is None and (self.into_parameters is None or len(self.steps) != 1):
            raise ValueError("Expected a cotangent, or into_parameters for a segment of one step, got neither.")
        if not self.leaps and any(t != self.steps[0] + i for i, t in enumerate(self.steps)):
            raise ValueError(f"Expected neighbouring steps, got {list(self.steps)}; give weights 0 to those left out.")


@dataclass(frozen=True)
class WalkedStep:
    """One step of a segment, differentiated.

    Attributes:
        t: the step.
        cotangent: that travelled to the step's mean, (b, ...) of the b samples that are walked; None if there is none.
        sample_weights: w_t of these samples, (b,); None for 1.
        gradients: one per parameter, before the segment's weight; empty for a step without weight.
        probed: gradients of the probes' cotangents.
        samples: b, how many were replayed.
        backward_passes: through the step, the probe's not counted.
        numbers: of ``into_parameters``, for the logs.
    """

    t: int
    cotangent: torch.Tensor | None
    sample_weights: torch.Tensor | None
    gradients: list[torch.Tensor]
    probed: list[list[torch.Tensor]]
    samples: int
    backward_passes: int
    numbers: Mapping[str, float]

    def cotangent_square(self) -> float:
        """``sum_i w_t,i |c_i|^2``: for weights 1 / q an unbiased estimate of all samples' sum."""
        if self.cotangent is None:
            return 0.0
        squares = self.cotangent.double().square().flatten(1).sum(1)
        if self.sample_weights is None:
            return float(squares.sum())
        return float(squares @ self.sample_weights.to(squares))


@dataclass(frozen=True)
class Booking:
    """What came of a segment: the one place where its norm and its costs are written down.

    Attributes:
        term, steps, weight, score_steps, note: the segment's.
        norm: Euclidean norm of the gradient that was added, summed over the batch's samples, weights included.
        replays: of a denoiser step, per sample of the batch.
        backward_passes: through a denoiser step, per sample of the batch.
        cotangent_squares: squared norm of the cotangent that travelled to every step, times the sample's weight there,
            summed over samples, float64.
        numbers: for the logs, means over the segment's steps.
    """

    term: str
    steps: tuple[int, ...]
    weight: float
    norm: float
    replays: float = 0.0
    backward_passes: float = 0.0
    cotangent_squares: tuple[float, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    score_steps: tuple[int, ...] = ()
    note: Any = None


class ReplayedStep:
    """One step of the chain on the tape, from where cotangents are pulled back, as often as needed.

    Args:
        with_latents: whether cotangents will be pulled back into the step's input too.
        of_reference: replay it with the reference instead, whose parameters are not trained.
        leads_to: what is differentiated: the step's mean, its prediction of x_0, or, given a step nearer to the image,
            a deterministic leap to that step's input.

    Attributes:
        latents: the step's input x_t, (B, ...).
        output: where the step leads without its noise, (B, ...), on the tape.
    """

    def __init__(
        self,
        chain: Chain,
        trajectory: Trajectory,
        t: int,
        leads_to: LeadsTo = "mean",
        with_latents: bool = True,
        of_reference: bool = False,
    ) -> None:
        self._parameters = list(chain.parameters)
        self._place = f"step {t}"
        replay = chain.replay_reference if of_reference else chain.replay
        self.latents = trajectory.latents[t].detach().requires_grad_(with_latents)
        with torch.enable_grad():
            step = replay(trajectory, t, self.latents)
            if isinstance(leads_to, int):
                points = chain.path_point(t), chain.path_point(leads_to)
                self.output = leap(self.latents, step.pred_original_sample, *points)
            else:
                self.output = step.mean if leads_to == "mean" else step.pred_original_sample

    def into_parameters(self, cotangent: torch.Tensor, *, keep: bool = False) -> list[torch.Tensor]:
        """One gradient per parameter; ``keep`` leaves the tape for another call."""
        return self._pull_back(self._parameters, cotangent, keep)

    def into_latents(self, cotangent: torch.Tensor) -> torch.Tensor:
        """The cotangent at the step's input x_t, (B, ...)."""
        return self._pull_back([self.latents], cotangent, keep=False)[0]

    def into_both(self, cotangent: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Both of the above in one backward pass."""
        *gradients, into_latents = self._pull_back([*self._parameters, self.latents], cotangent, keep=False)
        return gradients, into_latents

    def _pull_back(self, inputs: Sequence[torch.Tensor], cotangent: torch.Tensor, keep: bool) -> list[torch.Tensor]:
        return scaled_gradients(self.output, inputs, cotangent, self._place, keep)


def walk(
    chain: Chain,
    trajectory: Trajectory,
    segment: Segment,
    probes: Callable[[int], Sequence[torch.Tensor]] = lambda t: (),
) -> Iterator[WalkedStep]:
    """Differentiates a segment step by step; its weight is left to ``run``.

    Args:
        probes: gives other cotangents at the mean of a step, (B, ...), to be pulled back on the same tape.

    Raises:
        ValueError: the segment leaves the chain.
        DerivativeError: a cotangent is not finite.
    """
    steps = segment.steps
    if not steps or steps[0] < 1 or steps[-1] > trajectory.num_steps:
        raise ValueError(f"Expected a segment within steps 1..{trajectory.num_steps}, got steps {list(steps)}.")
    cotangent, weights = segment.cotangent, segment.sample_weights
    leads_to: LeadsTo = "prediction" if segment.from_prediction else "mean"
    for i, t in enumerate(steps):
        if weights is not None:
            walked = weights[i:].any(0).nonzero().flatten().tolist()
            if not walked:
                return
            if len(walked) < trajectory.batch_size:
                trajectory, weights = trajectory.select(walked), weights[:, walked]
                cotangent = None if cotangent is None else cotangent[walked]
        carry = 0.0 if i == len(steps) - 1 else 1.0 if segment.carry is None else segment.carry[i]
        part, own, own_weights = trajectory, cotangent, None if weights is None else weights[i]
        if carry == 0 and own_weights is not None:
            weighted = own_weights.nonzero().flatten().tolist()
            if 0 < len(weighted) < trajectory.batch_size:
                part, own_weights = trajectory.select(weighted), own_weights[weighted]
                own = None if cotangent is None else cotangent[weighted]
        carried = None
        if carry > 0 or own_weights is None or bool(own_weights.any()):
            replayed = ReplayedStep(chain, part, t, leads_to, with_latents=carry > 0)
            step, carried = _pull_back(replayed, segment, t, own, own_weights, carry > 0, probes(t))
            del replayed  # before the next: a pass into parameters alone frees no tape that leads elsewhere
            yield step
        if cotangent is not None and carry < 1:
            held = _held(chain, t, leads_to) * cotangent
            cotangent = held if carried is None else carry * carried + (1 - carry) * held
        elif cotangent is not None:
            cotangent = carried
        leads_to = t if segment.leaps else "mean"


def _pull_back(
    replayed: ReplayedStep,
    segment: Segment,
    t: int,
    cotangent: torch.Tensor | None,
    weights: torch.Tensor | None,
    travels: bool,
    probes: Sequence[torch.Tensor],
) -> tuple[WalkedStep, torch.Tensor | None]:
    """One step, and the cotangent at its input if it travels on."""
    probed = [replayed.into_parameters(probe, keep=True) for probe in probes]
    own, numbers = _into_parameters(segment, t, replayed.output.detach(), cotangent)
    gradients: list[torch.Tensor] = []
    into_latents, passes = None, 0
    if travels and own is cotangent and (weights is None or bool(weights.all())):
        # Samples do not mix: what is weighted on the way in can be unweighted in each sample's own part.
        passes = 1
        if weights is None:
            gradients, into_latents = replayed.into_both(own)
        else:
            factors = per_sample(weights, own)
            gradients, weighted = replayed.into_both(factors * own)
            into_latents = weighted / factors
    else:
        if weights is None or bool(weights.any()):
            own = own if weights is None else per_sample(weights, own) * own
            gradients, passes = replayed.into_parameters(own, keep=travels), 1
        if travels and cotangent is not None:
            into_latents, passes = replayed.into_latents(cotangent), passes + 1
    samples = len(replayed.latents)
    return WalkedStep(t, cotangent, weights, gradients, probed, samples, passes, numbers), into_latents


def _held(chain: Chain, t: int, leads_to: LeadsTo) -> float:
    """A_t, the derivative of where a step leads by its input, with the flow velocity held fixed."""
    if leads_to == "mean":
        return chain.input_sensitivity(t)
    start, end = chain.path_point(t), PathPoint(1.0, 0.0) if leads_to == "prediction" else chain.path_point(leads_to)
    return end.scale / start.scale


def _into_parameters(
    segment: Segment, t: int, mean: torch.Tensor, cotangent: torch.Tensor | None
) -> tuple[torch.Tensor, Mapping[str, float]]:
    if segment.into_parameters is not None:
        return segment.into_parameters(t, mean, cotangent)
    assert cotangent is not None  # as a segment without into_parameters has one
    return cotangent, {}


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshapes (B,) so that it multiplies (B, ...) sample by sample."""
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))


def run(chain: Chain, trajectory: Trajectory, segment: Segment) -> Booking:
    """Adds the segment's gradient, of the objective to be maximised, to ``.grad`` of the chain's parameters."""
    total = [torch.zeros_like(parameter) for parameter in chain.parameters]
    replays = passes = 0
    squares = dict.fromkeys(segment.steps, 0.0)
    numbers: defaultdict[str, list[float]] = defaultdict(list)
    for step in walk(chain, segment.trajectory or trajectory, segment):
        for summed, gradient in zip(total, step.gradients, strict=False):  # none of a step without weight
            summed.add_(gradient, alpha=segment.weight)
        replays += step.samples
        passes += step.samples * step.backward_passes
        squares[step.t] = step.cotangent_square()
        for name, value in step.numbers.items():
            numbers[name].append(value)
    return Booking(
        segment.term,
        tuple(segment.steps),
        segment.weight,
        add_to_gradients(chain, total),
        replays / trajectory.batch_size,
        passes / trajectory.batch_size,
        tuple(squares.values()),
        {name: fmean(values) for name, values in numbers.items()},
        segment.score_steps,
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
    # Within float32, with its reciprocal: by that GPUs divide.
    scale = 2.0 ** min(max(math.ceil(math.log2(largest)), -126), 127) if largest > 0 else 1.0
    gradients = torch.autograd.grad(
        output,
        inputs,
        (cotangent / scale).to(output.dtype),
        retain_graph=keep,
        allow_unused=True,
        materialize_grads=True,
    )
    return [gradient * scale for gradient in gradients]
