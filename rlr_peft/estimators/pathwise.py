"""First order (FO): the pathwise gradient of the reward, and the family of its approximations.

Every member differentiates chosen steps t with a weight w_t, and carries the cotangent from one to the next with a
factor a_t, see ``chain.adjoint.Segment``. The members differ in these, and in what the reward is asked about:

| method | steps | w_t | a_t | the reward sees |
|---|---|---|---|---|
| full backpropagation | all | 1 | 1 | x_0 |
| truncated (DRaFT-K 2309.17400, AlignProp 2310.03739) | 1..K | 1 | 1 | x_0 |
| roulette tail (ours) | 1..K, K drawn for every sample | 1 / P(K >= t) | 1 | x_0 |
| DRaFT-LV (2309.17400) | 1 | 1 / (n + 1) | | x_0 and n re-noised copies of it |
| ReFL (2304.05977) | one late step | 1 | | its prediction of x_0 |
| DRTune (2405.00760) | K spaced evenly from a late stop step on | 1 | 0 | the stop step's prediction of x_0 |
| LeapAlign (CVPR 2026) | two drawn ones, each one leap | by the leaps' errors | a at the later one | x_0 |
| FlowBP-Sparse (2606.11075) | K drawn by a density | by step sizes | 0 | x_0 |
| FlowBP-Bridge (2606.11075) | the same | the same | a at one drawn step, else 0 | x_0 |
| RSM, first order (2604.17415) | K drawn | std of the step | 0 | x_0, its derivative clipped |

With a_t = 0 the cotangent passes a step by a number alone: the whole chain is reached at the price of K steps.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain as chained
from itertools import pairwise
from typing import Any, Literal, Self

import torch

from rlr_peft.chain.adjoint import Segment, per_sample
from rlr_peft.chain.steps import Chain, leap
from rlr_peft.config.estimator import PathwiseArguments
from rlr_peft.config.methods import (
    DRaFTLVArguments,
    DRTuneArguments,
    FlowBPBridgeArguments,
    FlowBPSparseArguments,
    FullBPArguments,
    LeapArguments,
    ReFLArguments,
    RSMArguments,
    TruncatedBPArguments,
)
from rlr_peft.estimators.base import FIRST_ORDER, Book, Coverage, CoverageError, Estimator, RunShape
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.reports import counted, last_steps

TRUNCATED = "left out because the gradient is truncated"
CUT_AT_RANDOM = "left out at times because the gradient is truncated at a random step"
REWEIGHTED = "given another weight than 1 on purpose"
# Draws over which the expected weights of drawn steps are averaged, for the words of the coverage.
COVERAGE_DRAWS = 2000
# An error of a leap below this counts as this (LeapAlign).
SMALLEST_LEAP_ERROR = 0.1
# RSM clips |dR/dx_0| at this quantile of so many latest samples.
CLIP_QUANTILE, CLIP_WINDOW = 0.8, 512


@dataclass(frozen=True)
class PathwiseSettings:
    """A member of the family.

    Attributes:
        method: its name, for errors.
        steps: which are differentiated: the "last" ones, a "random" number of last ones, one drawn "late" one, some
            "spaced" evenly from a stop step on, some "drawn" without replacement with a probability that grows towards
            the clean end, or two drawn "leap"s.
        first_order_steps: K; None for all of them. A late step is one of the last K; None for a quarter of them.
        carry: a_t, None for 1 everywhere; of drawn steps it holds at one of them, of leaps at the later one, 0 at the
            others.
        density: b, a step is drawn in proportion to ``(T - t + 1)^b``.
        step_correction: rho, the weight of drawn steps is ``1 + rho (sum of all step sizes / sum of theirs - 1)``.
        weighted_by_std: a step's weight is its std over the mean std of all steps (RSM).
        renoised: n, copies of x_0 that are noised to x_1 again and denoised by step 1 (DRaFT-LV).
        stop_share: the stop step is drawn from this share of last steps.
        sees_prediction: whether the reward is that of the first step's prediction of x_0.
        clips: whether dR/dx_0 of a sample is clipped at a running quantile of its norm.
        coefficient: factor of the whole gradient.
        antithetic: samples come in neighbouring pairs with antithetic noise.
    """

    method: str
    steps: Literal["last", "random", "late", "spaced", "drawn", "leap"] = "last"
    first_order_steps: int | None = None
    carry: float | None = None
    density: float = 0.0
    step_correction: float = 0.0
    weighted_by_std: bool = False
    renoised: int = 0
    stop_share: float = 0.4
    sees_prediction: bool = False
    clips: bool = False
    coefficient: float = 1.0
    antithetic: bool = False

    def describe(self) -> str:
        """In words, for logs and cards."""
        count = "all steps" if self.first_order_steps is None else counted(self.first_order_steps, "step")
        which = {
            "last": "all steps" if self.first_order_steps is None else last_steps(self.first_order_steps),
            "random": "steps 1..K, K drawn from 1..T",
            "late": "a random one of the last "
            + ("quarter of the steps" if self.first_order_steps is None else counted(self.first_order_steps, "step")),
            "spaced": f"{count} spaced evenly from a step on that is drawn from the last {self.stop_share:.0%}",
            "drawn": f"{count} drawn in proportion to (T - t + 1)^{self.density:g}",
            "leap": "two drawn steps, each taken as one leap",
        }[self.steps]
        words = [f"reward gradient through {which}"]
        if self.sees_prediction:
            words[0] = f"gradient of the predicted image's reward through {which}"
        if self.carry is not None:
            where = (
                ""
                if self.carry == 0 or self.steps == "spaced"
                else f", except for a factor a = {self.carry:g} at one of them"
            )
            words.append(f"carried between steps with the velocity held fixed{where}")
        if self.step_correction:
            words.append(f"weighted for the steps left out with rho = {self.step_correction:g}")
        if self.weighted_by_std:
            words.append("weighted by the steps' noise")
        if self.renoised:
            words.append(f"averaged with {self.renoised} re-noised copies of every image")
        if self.clips:
            words.append(f"clipped at the {CLIP_QUANTILE:g} quantile of its norm")
        words += [] if self.coefficient == 1 else [f"times {self.coefficient:g}"]
        return "; ".join(words + (["antithetic noises"] if self.antithetic else []))


def pathwise_settings(arguments: PathwiseArguments | ReFLArguments) -> PathwiseSettings:
    """The member of the pathwise family that a method is.

    Raises:
        TypeError: another method.
    """
    settings = PathwiseSettings(arguments.estimator, antithetic=arguments.antithetic)
    if isinstance(arguments, PathwiseArguments):
        settings = replace(settings, coefficient=arguments.fo_coefficient)
    match arguments:
        case FullBPArguments():
            return settings
        case TruncatedBPArguments(fo_steps="random"):
            return replace(settings, steps="random")
        case TruncatedBPArguments(fo_steps=int(steps)):
            return replace(settings, first_order_steps=steps)
        case DRaFTLVArguments():
            return replace(settings, first_order_steps=1, renoised=arguments.renoised_copies)
        case ReFLArguments():
            return replace(settings, steps="late", first_order_steps=arguments.fo_steps, sees_prediction=True)
        case DRTuneArguments():
            return replace(
                settings,
                steps="spaced",
                first_order_steps=arguments.fo_steps,
                carry=0.0,
                stop_share=arguments.stop_share,
                sees_prediction=True,
            )
        case LeapArguments():
            return replace(settings, steps="leap", first_order_steps=2, carry=arguments.fo_carry)
        case FlowBPSparseArguments():
            return replace(
                settings,
                steps="drawn",
                first_order_steps=arguments.fo_steps,
                carry=arguments.fo_carry if isinstance(arguments, FlowBPBridgeArguments) else 0.0,
                density=arguments.step_density,
                step_correction=arguments.step_correction,
            )
        case RSMArguments():
            return replace(
                settings,
                steps="drawn",
                first_order_steps=arguments.fo_steps,
                carry=0.0,
                weighted_by_std=True,
                clips=True,
            )
        case _:
            raise TypeError(f"expected a method of the pathwise family, got {arguments.estimator}")


@dataclass(frozen=True)
class ChosenSteps:
    """The steps of one micro-batch: rising, their weights w_t, and a_t."""

    steps: list[int]
    weights: list[float]
    carry: list[float]

    @classmethod
    def last(cls, count: int) -> "ChosenSteps":
        """Steps 1..K, all differentiated."""
        return cls(list(range(1, count + 1)), [1.0] * count, [1.0] * count)


class PathwiseEstimator(Estimator):
    """One member of the family of pathwise gradients. Advantages are for the logs alone."""

    uses_reward_gradient = True

    def __init__(self, arguments: PathwiseArguments | ReFLArguments) -> None:
        self.settings = pathwise_settings(arguments)
        # For mirrored noises, and for weights by the steps' noise.
        self.needs_noise = self.settings.antithetic or self.settings.weighted_by_std
        self._norms: deque[float] = deque(maxlen=CLIP_WINDOW)
        self._expected: dict[tuple[float, ...], torch.Tensor] = {}

    @classmethod
    def from_arguments(cls, arguments: PathwiseArguments | ReFLArguments, shape: RunShape) -> Self:
        return cls(arguments)

    def describe(self, has_gradient: bool | None = None) -> str:
        return self.settings.describe()

    def compares_images(self, chain: Chain, has_gradient: bool) -> bool:
        """Only mirrored noise needs a second image of the prompt."""
        return self.settings.antithetic

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """The expected weight of every step; of drawn steps by simulation.

        Raises:
            CoverageError: the reward has no gradient.
        """
        settings = self.settings
        if not has_gradient:
            raise CoverageError(
                f"Expected a differentiable reward for {settings.method}, got one without gradient. "
                "Use --estimator rlr."
            )
        departures = tuple(self._departures())
        if settings.sees_prediction or settings.steps == "leap":
            return Coverage(torch.zeros(chain.num_steps, dtype=torch.float64), {}, None, departures)
        weights = settings.coefficient * self._expected_weights(chain)
        gaps = {t: self._gap(weight) for t, weight in enumerate(weights.tolist(), start=1)}
        return Coverage(weights, gaps, None, departures)

    def _expected_weights(self, chain: Chain) -> torch.Tensor:
        """Of every step, (T,), float64, before the coefficient; every update asks, and steps are drawn for it once."""
        total = chain.num_steps
        if self.settings.steps == "random":
            return torch.arange(total, 0, -1, dtype=torch.float64) / total
        steps = (*step_sizes(chain), *(chain.std(t) for t in range(1, total + 1)))
        if steps not in self._expected:
            draws = COVERAGE_DRAWS if self.settings.steps == "drawn" else 1
            weights, generator = torch.zeros(total, dtype=torch.float64), torch.Generator().manual_seed(0)
            for _ in range(draws):
                chosen = self.choose(chain, generator)
                weights[[t - 1 for t in chosen.steps]] += torch.tensor(chosen.weights, dtype=torch.float64)
            self._expected[steps] = weights / draws
        return self._expected[steps]

    def _gap(self, weight: float) -> str:
        """Why a step has this expected weight, where it is not 1."""
        if self.settings.steps == "random":
            return CUT_AT_RANDOM
        return TRUNCATED if self.settings.steps == "last" and weight == 0 else REWEIGHTED

    def _departures(self) -> Iterator[str]:
        settings = self.settings
        if settings.sees_prediction:
            yield "the reward of the image predicted at a late step stands in for the image's"
        if settings.steps == "leap":
            yield "two leaps with weights by their errors stand in for the chain"
        if settings.carry is not None:
            yield "the reward's gradient passes steps with the denoiser's velocity held fixed"
        if settings.renoised:
            yield "the gradient of re-noised copies of the image is mixed in"
        if settings.clips:
            yield "the reward's gradient is clipped"

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterator[Segment]:
        """The chosen steps as one segment, and one more for every re-noised copy."""
        assert rollout.reward_gradient is not None  # as the coverage has checked
        settings, trajectory = self.settings, rollout.trajectory
        chosen = self.choose(chain, generator)
        cotangent, weights = rollout.reward_gradient, _for_samples(chosen.weights, trajectory.batch_size)
        if settings.steps == "leap":
            weights = leap_weights(chain, rollout, *chosen.steps).expand(2, -1)
        if settings.sees_prediction:
            predicted = trajectory.pred_original_samples[chosen.steps[0] - 1]
            _, cotangent = objective.score_with_gradient(predicted, trajectory.prompts)
        note = None
        if settings.clips:
            note = cotangent.flatten(1).norm(dim=1).tolist()
            cotangent = self._clipped(cotangent, note)
        share = settings.coefficient / (1 + settings.renoised)
        yield Segment(
            FIRST_ORDER,
            chosen.steps,
            cotangent,
            share,
            weights,
            chosen.carry,
            from_prediction=settings.sees_prediction or settings.steps == "leap",
            leaps=settings.steps == "leap",
            note=note,
        )
        for _ in range(settings.renoised):
            yield renoised_segment(chain, objective, rollout, share, generator)

    def learn(self, books: Sequence[Book]) -> None:
        """Remembers the norms of the rewards' gradients."""
        for booking in chained.from_iterable(book.bookings for book in books):
            self._norms.extend(booking.note or ())

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = deque(state["norms"], maxlen=CLIP_WINDOW)

    def _clipped(self, cotangent: torch.Tensor, norms: list[float]) -> torch.Tensor:
        known = torch.tensor(self._norms or norms, dtype=torch.float64)
        limit = known.quantile(CLIP_QUANTILE)
        factors = (limit / torch.tensor(norms, dtype=torch.float64).clamp(min=1e-300)).clamp(max=1)
        return per_sample(factors, cotangent) * cotangent

    def choose(self, chain: Chain, generator: torch.Generator) -> ChosenSteps:
        """The steps of one micro-batch; the generator (CPU) draws them where they are drawn."""
        settings, total = self.settings, chain.num_steps
        match settings.steps:
            case "last":
                return ChosenSteps.last(self._count(total))
            case "random":
                return ChosenSteps.last(_draw(total, generator))
            case "late":
                step = _draw(settings.first_order_steps or math.ceil(total / 4), generator)
                return ChosenSteps([step], [1.0], [0.0])
            case "leap":
                later, earlier = sorted((1 + torch.randperm(total, generator=generator)[:2]).tolist())
                return ChosenSteps([later, earlier], [1.0, 1.0], [settings.carry or 0.0, 0.0])
            case "spaced":
                stop = _draw(math.ceil(settings.stop_share * total), generator)
                spaced = torch.linspace(stop, total, self._count(total)).round().int().tolist()
                return self._weighted(chain, stop, sorted(set(spaced)))
            case "drawn":
                density = torch.arange(total, 0, -1, dtype=torch.float64) ** settings.density
                drawn = torch.multinomial(density, self._count(total), generator=generator)
                chosen = self._weighted(chain, 1, sorted((1 + drawn).tolist()))
                if settings.carry and len(drawn) > 1:  # the last one leads nowhere
                    bridge = sorted((1 + drawn).tolist())[_draw(len(drawn) - 1, generator) - 1]
                    chosen.carry[chosen.steps.index(bridge)] = settings.carry
                return chosen

    def _count(self, total: int) -> int:
        return total if self.settings.first_order_steps is None else min(self.settings.first_order_steps, total)

    def _weighted(self, chain: Chain, first: int, chosen: list[int]) -> ChosenSteps:
        """The chosen steps with their weights, and those between with 0, past which cotangents go by a number."""
        weights = dict.fromkeys(chosen, 1.0)
        if self.settings.step_correction:
            sizes = step_sizes(chain)
            left_out = sum(sizes) / sum(sizes[t - 1] for t in chosen) - 1
            weights = dict.fromkeys(chosen, 1 + self.settings.step_correction * left_out)
        if self.settings.weighted_by_std:
            stds = [chain.std(t) for t in range(1, chain.num_steps + 1)]
            weights = {t: chain.std(t) * len(stds) / sum(stds) for t in chosen}
        steps = list(range(first, chosen[-1] + 1))
        return ChosenSteps(steps, [weights.get(t, 0.0) for t in steps], [0.0] * len(steps))


def step_sizes(chain: Chain) -> list[float]:
    """How far every step leads in flow time, at index t - 1."""
    times = [chain.path_point(t).noise_share for t in range(chain.num_steps + 1)]
    return [start - end for end, start in pairwise(times)]


def leap_weights(chain: Chain, rollout: Rollout, later: int, earlier: int) -> torch.Tensor:
    """``1 / (max(d_j, .1) + max(d_0, .1))`` of every sample, (B,), with d the mean absolute error of its two leaps.

    Args:
        rollout: its samples hold what the leaps missed.
        later: step j, from where the second leap leads to the clean latents.
        earlier: step k > j, from where the first leap leads to x_j.
    """
    trajectory = rollout.trajectory
    points = chain.path_point(earlier), chain.path_point(later)
    reached = leap(trajectory.latents[earlier], trajectory.pred_original_samples[earlier - 1], *points)
    missed = (reached - trajectory.latents[later], trajectory.pred_original_samples[later - 1] - trajectory.latents[0])
    first, second = (error.abs().flatten(1).mean(1).clamp(min=SMALLEST_LEAP_ERROR) for error in missed)
    return 1 / (first + second)


def renoised_segment(
    chain: Chain, objective: Objective, rollout: Rollout, weight: float, generator: torch.Generator
) -> Segment:
    """The last step once more, from x_0 noised to x_1 afresh; costs an evaluation and a reward."""
    clean = rollout.trajectory.latents[0]
    point = chain.path_point(1)
    noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean)
    noised = point.alpha * clean + point.sigma * noise
    latents = torch.cat([clean[None], noised[None], rollout.trajectory.latents[2:]])
    copies = replace(rollout.trajectory, latents=latents)
    _, cotangent = objective.score_with_gradient(chain.denoise(copies, 1, noised), copies.prompts)
    return Segment(FIRST_ORDER, (1,), cotangent, weight, trajectory=copies)


def _draw(count: int, generator: torch.Generator) -> int:
    """An even draw from 1..count."""
    return 1 + int(torch.randint(count, (1,), generator=generator))


def _for_samples(weights: list[float], samples: int) -> torch.Tensor | None:
    """Weights of steps (steps, B); None if all are 1."""
    if all(weight == 1 for weight in weights):
        return None
    return torch.tensor(weights, dtype=torch.float64)[:, None].expand(-1, samples)
