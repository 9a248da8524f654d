"""What an estimator is: a list of backward segments over a chain, and one book of what came of them."""

import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from rlr_peft.chain import adjoint
from rlr_peft.chain.adjoint import Booking, Segment
from rlr_peft.chain.steps import Chain
from rlr_peft.config.chain import MovingWindow
from rlr_peft.config.estimator import EstimatorArguments
from rlr_peft.errors import UserError
from rlr_peft.estimators.advantages import leave_one_out, separately_normalized
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.estimators.zeroth_order import Perturbation, perturb
from rlr_peft.prompt import Stages, texts_of

# A step is hot whose mean moves more than this per unit of denoiser output and of its noise.
HOT_STEP = 3.0

# Terms that follow the reward's own gradient.
FIRST_ORDER, MIXED_ORDER = "first_order", "mixed_order"


class CoverageError(UserError, ValueError):
    """An estimator's terms do not cover the chain as they claim."""


@dataclass(frozen=True)
class Coverage:
    """With which expected weight the terms of an estimator cover every step, and why where it is not 1.

    An estimator is unbiased when every step's expected weight is 1; another weight biases it, and must be a choice.

    Attributes:
        weights: ``weights[t - 1]`` is the expected weight of step t, (T,), float64.
        gaps: reason by step for every step that is left out by choice.
        smoothing: scale s of the zeroth order's perturbation where there is one: its gradient is that of the smoothed
            objective, biased in the order of s squared; None without it.
        departures: what makes the estimate another than the gradient of the expected reward although steps are covered,
            one clause each.
    """

    weights: torch.Tensor
    gaps: Mapping[int, str]
    smoothing: float | None = None
    departures: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every step is covered with expected weight 1."""
        return bool(torch.allclose(self.weights, torch.ones_like(self.weights), rtol=0, atol=1e-9))

    @property
    def unbiased(self) -> bool:
        """Whether the estimate is unbiased: every step covered, nothing smoothed, no departure."""
        return self.complete and self.smoothing is None and not self.departures

    def check(self) -> None:
        """Raises:
        CoverageError: a step's weight is not 1 and no reason was given.
        """
        for t, weight in enumerate(self.weights.tolist(), start=1):
            if abs(weight - 1) > 1e-9 and t not in self.gaps:
                raise CoverageError(f"Expected coverage 1 at step {t} of {len(self.weights)}, got {weight:.6g}.")

    def describe(self) -> str:
        """One or two sentences for logs and cards."""
        if self.unbiased:
            return "Every step is covered with expected weight 1: the gradient estimate is unbiased."
        clauses = list(self.departures)
        if self.smoothing is not None:
            smoothed = (
                "the zeroth-order term estimates the gradient of the objective smoothed at "
                f"s = {self.smoothing:g}, with a bias of order s squared"
            )
            if self.complete and not self.departures:
                return f"Every step is covered with expected weight 1; {smoothed}."
            clauses.append(smoothed)
        off = [t for t, weight in enumerate(self.weights.tolist(), start=1) if abs(weight - 1) > 1e-9]
        for reason in sorted({self.gaps[t] for t in off if t in self.gaps}):
            steps = [t for t in off if self.gaps.get(t) == reason]
            subject, verb = ("step", "is") if len(steps) == 1 else ("steps", "are")
            clauses.append(f"{subject} {step_ranges(steps)} of {len(self.weights)} {verb} {reason}")
        return f"The gradient is biased: {'; '.join(clauses)}."


def step_ranges(steps: list[int]) -> str:
    """Steps in words, runs of them joined: ``1-3, 7``."""
    parts: list[list[int]] = []
    for t in steps:
        if parts and t == parts[-1][-1] + 1:
            parts[-1].append(t)
        else:
            parts.append([t])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


@dataclass(frozen=True)
class Book:
    """What one micro-batch of an update came to, in plain values that processes can exchange.

    Attributes:
        prompts: of the B samples.
        rewards: of the samples.
        advantages: of the samples, as the estimator made them of the rewards of all processes.
        reward_gradient_square: squared norm of dR/dx_0, summed over samples; None for a reward without gradient.
        bookings: one for every term that was run.
        hot_steps: ``|d mean / d output| / std`` of the steps with a score term whose mean reacts too strongly to the
            denoiser, so that the term is very noisy there.
    """

    prompts: list[str]
    rewards: list[float]
    advantages: list[float]
    reward_gradient_square: float | None
    bookings: list[Booking]
    hot_steps: Mapping[int, float]

    @property
    def backward_passes(self) -> float:
        """Backward passes through a denoiser step, per sample."""
        return sum(booking.backward_passes for booking in self.bookings)

    @property
    def first_order_steps(self) -> float:
        """K, steps that the pathwise gradient was taken through, on average over samples."""
        return sum(booking.replays for booking in self.bookings if booking.term in (FIRST_ORDER, MIXED_ORDER))

    @classmethod
    def of(cls, chain: Chain, rollout: Rollout, advantages: torch.Tensor, bookings: list[Booking]) -> "Book":
        """Of a micro-batch, its samples' advantages (B,), and the terms that were run on it."""
        gradient = rollout.reward_gradient
        return cls(
            texts_of(rollout.trajectory.prompts),
            rollout.rewards.tolist(),
            advantages.tolist(),
            None if gradient is None else float(gradient.double().square().sum()),
            bookings,
            hot_steps(chain, itertools.chain.from_iterable(booking.score_steps for booking in bookings)),
        )

    def norms(self) -> dict[str, float]:
        """Euclidean norms of each term's parts for the mean reward of the micro-batch, summed by term."""
        norms: dict[str, float] = {}
        for booking in self.bookings:
            norms[booking.term] = norms.get(booking.term, 0.0) + booking.norm / len(self.rewards)
        return norms

    def numbers(self) -> dict[str, float]:
        """The terms' own numbers, means over bookings."""
        names = dict.fromkeys(name for booking in self.bookings for name in booking.numbers)
        return {name: fmean(b.numbers[name] for b in self.bookings if name in b.numbers) for name in names}


@dataclass(frozen=True)
class RunShape:
    """What an estimator is made for, besides its knobs.

    Attributes:
        num_inference_steps: T.
        stages: those that ``ho_window`` may name.
        samples: of an update, in all processes.
        measures_batch: whether ``auto`` chooses how many times as many an update has, up to its calibration's samples.
    """

    num_inference_steps: int
    stages: Stages | None = None
    samples: int = 1
    measures_batch: bool = False


class Estimator(ABC):
    """Turns sampled and scored rollouts into backward segments of the gradient of the expected reward.

    A new estimator is a class with ``describe``, ``coverage`` and ``segments``; the rest does nothing unless an
    estimator normalises advantages in its own way, measures variances, or learns from past updates.

    Attributes:
        inner_epochs: optimiser steps taken on the same samples.
        uses_reward_gradient: whether a reward's gradient is of use; without, its tape and the decoder's are spared.
        is_calibrated: whether ``calibrate`` has run, in this session or before the checkpoint that was loaded.
        fewest_measured: samples of a calibration, however short the run.
        micro_batches: that an update should have on every process, where the config leaves it to the estimator.
        advantage_clip: normalised advantages are clipped to plus or minus this; None leaves them.
        shares_draws: whether the images of a prompt share the estimator's draws, also those of different micro-batches.
        needs_noise: whether the samples of the next update must come from steps with noise.
        goes_back: whether training goes back where the reward falls with a learning rate that is given too.
    """

    inner_epochs: int = 1
    uses_reward_gradient: bool = False
    is_calibrated: bool = True
    fewest_measured: int = 4
    micro_batches: int = 1
    advantage_clip: float | None = None
    shares_draws: bool = False
    needs_noise: bool = True
    goes_back: bool = False

    @abstractmethod
    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards; `has_gradient` is the reward's, None where that is not known."""

    def for_reward(self, has_gradient: bool) -> "Estimator":
        """Who makes the gradient of such a reward: this estimator, or one that it leaves it to."""
        return self

    @abstractmethod
    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """What the segments of the next update cover in expectation.

        Raises:
            CoverageError: there is no term for this reward.
        """

    @abstractmethod
    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterable[Segment | Perturbation]:
        """The terms of the gradient of the micro-batch's SUMMED reward, made one by one as they are run.

        Args:
            chain: the chain, in the weights that train.
            objective: scores clean latents, for terms that need other rewards than the samples' own.
            rollout: the samples of the micro-batch, B of them.
            advantages: of these samples, (B,): their part of what ``advantages`` made of the rewards of all processes.
            generator: of the estimator's draws, on the CPU.
        """

    def accumulate(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Book:
        """Runs the segments of a micro-batch: adds its gradient to ``.grad`` of the chain's parameters."""
        terms = self.segments(chain, objective, rollout, advantages, generator)
        bookings = [add_term(chain, objective, rollout, term, generator) for term in terms]
        return Book.of(chain, rollout, advantages, bookings)

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Advantages (N,) of the rewards (N,) of all processes, the samples of one prompt side by side."""
        return leave_one_out(rewards, group_size)

    def advantages_of_each(
        self, rewards: Mapping[str, torch.Tensor], weights: Mapping[str, float], group_size: int
    ) -> torch.Tensor:
        """Advantages (N,) where every reward makes its own (GDPO): rewards (N,) and weights by name."""
        return self._clipped_advantages(separately_normalized(rewards, weights, group_size))

    def _clipped_advantages(self, advantages: torch.Tensor) -> torch.Tensor:
        if self.advantage_clip is None:
            return advantages
        return advantages.clamp(-self.advantage_clip, self.advantage_clip)

    def compares_images(self, chain: Chain, has_gradient: bool) -> bool:
        """Whether the next update compares the rewards of a prompt's images with each other.

        Where it does not, every image has a prompt of its own: the reward's gradient hardly differs between the images
        of one.
        """
        return True

    def wants_calibration(self, has_gradient: bool) -> bool:
        """Whether ``calibrate`` is of use, before the first update and every so often."""
        return False

    def calibrate(  # noqa: B027
        self, chain: Chain, rollouts: Sequence[Rollout], advantages: torch.Tensor, decay: float
    ) -> None:
        """Measures on rollouts that no update uses, of samples with these advantages (N,).

        Args:
            decay: weight of the past.
        """

    def see_gradient(self, parameters: Sequence[torch.nn.Parameter], samples: int) -> None:  # noqa: B027
        """Looks at what an update is about to follow, before it is clipped.

        Args:
            parameters: with, as ``.grad``, the gradient of minus the mean reward over the samples of all processes.
        """

    def learn(self, books: Sequence[Book]) -> None:  # noqa: B027
        """Learns from a finished update: the books of all micro-batches and processes, in their order."""

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, of plain types and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restores what ``state_dict`` returned."""


def build_estimator(arguments: EstimatorArguments, shape: RunShape) -> Estimator:
    """That of the class which ``arguments.made_by`` names, by its ``from_arguments``.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
    """
    module, name = arguments.made_by.split(".")
    maker: Any = getattr(importlib.import_module(f"rlr_peft.estimators.{module}"), name)
    estimator: Estimator = maker.from_arguments(arguments, shape)
    return estimator


def coverage_of(estimator: Estimator, chain: Chain, has_gradient: bool) -> Coverage:
    """The estimator's coverage, and what of the chain's own derivatives departs.

    Raises:
        CoverageError: there is no term for this reward.
    """
    coverage = estimator.coverage(chain, has_gradient)
    return replace(coverage, departures=(*coverage.departures, *chain.departures))


def over_updates(coverage: Coverage, moving: MovingWindow) -> Coverage:
    """The coverage of an update, on average over all places of its noise."""
    shares = moving.shares()
    weights, gaps = coverage.weights.clone(), dict(coverage.gaps)
    weights[moving.first - 1 : moving.last] = torch.tensor(list(shares.values()), dtype=weights.dtype)
    gaps |= {t: moving.describe() for t, share in shares.items() if share < 1}
    return replace(coverage, weights=weights, gaps=gaps)


def add_term(
    chain: Chain, objective: Objective, rollout: Rollout, term: Segment | Perturbation, generator: torch.Generator
) -> Booking:
    """Runs one term: adds its gradient to ``.grad`` of the chain's parameters.

    Raises:
        DerivativeError: a derivative is not finite.
    """
    if isinstance(term, Segment):
        return adjoint.run(chain, rollout.trajectory, term)
    return perturb(chain, objective, rollout.trajectory, term, generator)


def hot_steps(chain: Chain, steps: Iterable[int]) -> dict[int, float]:
    """``|d mean / d output| / std`` of those steps, all with noise, whose mean reacts too strongly to the denoiser."""
    ratios = {t: chain.output_sensitivity(t) / chain.std(t) for t in steps}
    return {t: ratio for t, ratio in ratios.items() if ratio > HOT_STEP}
