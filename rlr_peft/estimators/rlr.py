"""The Recursive Likelihood Ratio (RLR) estimator: first order + half order (+ zeroth order), one sum, one step.

Every step of the chain is covered with weight 1 in expectation, so the sum is an unbiased estimate of the gradient of
E[R(x_0)]: the pathwise tail (FO) takes steps 1..K, half-order blocks (HO) or the zeroth order (ZO) the rest. Full
backpropagation, truncated backpropagation and REINFORCE are the special cases K = T, no HO, and K = 0.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rlr_peft.chain.adjoint import Segment
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.base import Book, Coverage, CoverageError, Estimator, Rollout
from rlr_peft.estimators.half_order import (
    DEFENSIVE_SHARE,
    Block,
    HalfOrder,
    black_box_segment,
    choose_stage,
    draw,
    draw_probabilities,
    expected_draws,
    free_blocks,
    half_order_segment,
    tiles,
)
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.pathwise import first_order_segment, mixed_segment
from rlr_peft.estimators.variance import (
    GradientSketch,
    StepGradients,
    StepStatistics,
    best_first_order_steps,
    inverse_variance_weights,
    measure_step_gradients,
)
from rlr_peft.estimators.zeroth_order import Perturbation, ZerothOrder

TRUNCATED = "left out because the gradient is truncated"
CUT_AT_RANDOM = "left out at times because the gradient is truncated at a random step"
NEEDS_NOISE = "left out because a score term needs noise there"
OUTSIDE_WINDOW = "left out, outside the chosen window"
COEFFICIENTS = "given another weight than 1 by the chosen coefficients"


@dataclass(frozen=True)
class Coefficients:
    """Factor of each term; anything but 1 is a choice of bias.

    Attributes:
        first_order: of the pathwise gradient.
        half_order: of the score terms, those of the black-box tail among them.
        zeroth_order: of the perturbation term.
    """

    first_order: float = 1.0
    half_order: float = 1.0
    zeroth_order: float = 1.0


@dataclass(frozen=True)
class RLRSettings:
    """What the estimator is made of.

    Attributes:
        first_order_steps: K; "auto" for the measured choice, "random" for a uniform draw in 1..T for every micro-batch.
        half_order: blocks beyond K; None leaves them to the zeroth order or uncovered.
        zeroth_order: covers what the other terms leave over; None for nothing.
        black_box_steps: steps 1..n that get black-box tail terms when the reward has no gradient.
        step_choice: what "auto" measures: one K, or a weight for every step that mixes both terms.
        state_baseline: take the reward of the predicted image off the advantages of the score terms.
        coefficients: factor of each term.
    """

    first_order_steps: int | Literal["auto", "random"] = "auto"
    half_order: HalfOrder | None = HalfOrder(length=1, blocks="all")
    zeroth_order: ZerothOrder | None = None
    black_box_steps: int = 0
    step_choice: Literal["crossing", "inverse-variance"] = "crossing"
    state_baseline: bool = False
    coefficients: Coefficients = Coefficients()

    @property
    def measures_steps(self) -> bool:
        """Whether K, or the mixture, is chosen by measurement."""
        return self.first_order_steps == "auto"

    @property
    def measures_window(self) -> bool:
        """Whether the window of the half-order starts is chosen by measurement."""
        return self.half_order is not None and bool(self.half_order.stage_windows)

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards; `has_gradient` is the reward's, None where that is not known."""
        tail = []
        if has_gradient is not False and self.first_order_steps != 0:
            tail.append(self._describe_first_order())
        if not has_gradient and self.black_box_steps > 0:
            condition = " if the reward has no gradient" if has_gradient is None else ""
            tail.append(f"mirrored noises on the last {self.black_box_steps} step(s){condition}")
        terms = [", or ".join(tail)] if tail else []
        if self.half_order is not None:
            baseline = " and a state baseline" if self.state_baseline else ""
            terms.append(self.half_order.describe() + baseline)
        if self.zeroth_order is not None:
            terms.append(f"{self.zeroth_order.form} zeroth order with s = {self.zeroth_order.scale:g} on the rest")
        if self.coefficients != Coefficients():
            c = self.coefficients
            terms.append(f"coefficients {c.first_order:g}, {c.half_order:g}, {c.zeroth_order:g} of the three orders")
        return "; ".join(terms)

    def _describe_first_order(self) -> str:
        if self.measures_steps and self.step_choice == "inverse-variance":
            return "first and half order mixed at every step by their measured variances"
        k = {"auto": "K measured", "random": "K drawn from 1..T"}.get(
            str(self.first_order_steps), f"K = {self.first_order_steps}"
        )
        return f"first order on steps 1..K, {k}"


@dataclass(frozen=True)
class Layout:
    """Which term covers which step, for one K.

    Attributes:
        first_order_steps: K; 0 for none.
        mixture: weight of the pathwise term of steps 1..K, (K,), the score term's being the rest; None for 1.
        black_box_steps: steps with a black-box tail term.
        blocks: half-order blocks that all are used, or candidates that are drawn from.
        weights: of the blocks, where they are used.
        probabilities: of every block in a single draw, (len(blocks),); None if all are used.
        num_draws: how many are drawn.
        left: steps that the zeroth order covers where no drawn block does.
        coverage: expected weight of every step.
    """

    first_order_steps: int
    mixture: torch.Tensor | None
    black_box_steps: list[int]
    blocks: list[Block]
    weights: list[float]
    probabilities: torch.Tensor | None
    num_draws: int
    left: list[int]
    coverage: Coverage

    def draw(self, generator: torch.Generator) -> tuple[list[tuple[Block, float]], list[int]]:
        """The blocks of one micro-batch with their weights, and the steps that are left to the zeroth order."""
        if self.probabilities is None:
            return list(zip(self.blocks, self.weights, strict=True)), self.left
        chosen = [(self.blocks[i], self.weights[i]) for i in draw(self.probabilities, self.num_draws, generator)]
        return chosen, [t for t in self.left if not any(t in block.steps for block, _ in chosen)]


class _Weights:
    """Adds up the expected weight of every step, and keeps the reason of one that is not 1."""

    def __init__(self, num_steps: int) -> None:
        self.values = torch.zeros(num_steps, dtype=torch.float64)
        self.reasons: dict[int, str] = {}

    def cover(self, steps: Iterable[int], weight: float, reason: str | None) -> None:
        for t in steps:
            self.values[t - 1] += weight
            if reason is not None:
                self.reasons[t] = reason

    def coverage(self, smoothing: float | None) -> Coverage:
        off = [t for t, weight in enumerate(self.values.tolist(), start=1) if abs(weight - 1) > 1e-9]
        return Coverage(self.values, {t: self.reasons[t] for t in off if t in self.reasons}, smoothing)


def lay_out(
    settings: RLRSettings,
    chain: Chain,
    *,
    first_order_steps: int,
    has_gradient: bool,
    block_norms: Mapping[int, float] | None = None,
    mixture: torch.Tensor | None = None,
) -> Layout:
    """Decides which term covers which step, and checks the coverage.

    Args:
        settings: the terms; a measured window has been filled in.
        chain: its steps and their noise.
        first_order_steps: K; ignored for a reward without gradient.
        has_gradient: the reward's.
        block_norms: running gradient norm by first step of a block.
        mixture: weight of the pathwise term of steps 1..K, (K,); None for 1.

    Raises:
        CoverageError: there is no term for this reward, or a step is not covered as it should be.
    """
    num_steps, c = chain.num_steps, settings.coefficients
    tail = range(1, first_order_steps + 1) if has_gradient else range(0)
    mirrored = range(0) if has_gradient else range(1, min(settings.black_box_steps, num_steps) + 1)
    black_box = [t for t in mirrored if chain.std(t) > 0]
    weights = _Weights(num_steps)
    for t in range(1, num_steps + 1):
        weights.cover([t], 0.0, _why_left_out(settings, chain, t))
    for t in tail:
        share = 1.0 if mixture is None else float(mixture[t - 1])
        weights.cover([t], share * c.first_order + (1 - share) * c.half_order, COEFFICIENTS)
    weights.cover(black_box, c.half_order, COEFFICIENTS)
    left = [t for t in range(1, num_steps + 1) if t not in tail and t not in black_box]
    candidates = _candidates(settings, chain, max(len(tail), len(mirrored)))
    half_order, probabilities, num_draws = settings.half_order, None, 0
    if settings.zeroth_order is not None:  # the paper's form: one block, the zeroth order on whatever else is left
        block_weights = [c.half_order] * len(candidates)
        if half_order is None or not candidates:
            weights.cover(left, c.zeroth_order, COEFFICIENTS)
        else:
            probabilities, num_draws = draw_probabilities(candidates, half_order, block_norms or {}), 1
            for block, probability in zip(candidates, probabilities.tolist(), strict=True):
                weights.cover(block.steps, probability * c.half_order, COEFFICIENTS)
                weights.cover(set(left) - set(block.steps), probability * c.zeroth_order, COEFFICIENTS)
    else:
        left = []
        expectations = [1.0] * len(candidates)
        if half_order is not None and half_order.blocks != "all" and candidates:
            probabilities = draw_probabilities(candidates, half_order, block_norms or {}, DEFENSIVE_SHARE)
            num_draws = half_order.blocks
            expectations = expected_draws(probabilities, num_draws).tolist()
        block_weights = [c.half_order / chance if chance > 0 else 0.0 for chance in expectations]
        for block, chance, weight in zip(candidates, expectations, block_weights, strict=True):
            if chance > 0:
                weights.cover(block.steps, chance * weight, COEFFICIENTS)
    if not (tail or black_box or candidates or left):
        raise CoverageError(f"Expected an estimator with a term for this reward, got none: {_why_none(settings)}")
    has_perturbation = settings.zeroth_order is not None and (set(left) - {t for b in candidates[:1] for t in b.steps})
    coverage = weights.coverage(settings.zeroth_order.scale if settings.zeroth_order and has_perturbation else None)
    coverage.check()
    return Layout(
        len(tail),
        mixture if tail else None,
        black_box,
        candidates,
        block_weights,
        probabilities,
        num_draws,
        left,
        coverage,
    )


def _candidates(settings: RLRSettings, chain: Chain, covered_tail: int) -> list[Block]:
    """The half-order blocks beyond the covered tail: tiles, or with a zeroth order any block that starts with noise."""
    half_order, num_steps = settings.half_order, chain.num_steps
    if half_order is None or covered_tail >= num_steps or not half_order.draws_beyond(covered_tail):
        return []
    if settings.zeroth_order is None:
        noiseless = [t for t in range(1, num_steps + 1) if chain.std(t) == 0]
        return tiles(covered_tail + 1, num_steps, half_order.length, noiseless)
    blocks = free_blocks(covered_tail + 1, num_steps, min(half_order.length, num_steps - covered_tail))
    return [block for block in blocks if chain.std(block.first_step) > 0]


def _why_left_out(settings: RLRSettings, chain: Chain, t: int) -> str | None:
    """Why it is by choice, or for lack of any term, that none covers step t; None where one must."""
    half_order = settings.half_order
    if half_order is None:
        return CUT_AT_RANDOM if settings.first_order_steps == "random" else TRUNCATED
    if chain.std(t) == 0:
        return NEEDS_NOISE
    if half_order.start != "window":
        return None
    stages = [stage.name for stage in half_order.stage_windows if (stage.first, stage.last) == half_order.window]
    return OUTSIDE_WINDOW + (f" (measured: stage {stages[0]})" if stages else "")


def _why_none(settings: RLRSettings) -> str:
    """Why there is no term at all, and what to do."""
    no_gradient = "the reward has no gradient (or K is 0)"
    if settings.half_order is None and settings.black_box_steps == 0:
        return f"{no_gradient} and there are no half-order or zeroth-order terms. Use estimator rlr."
    return (
        f"{no_gradient} and score terms need noise, which no step has: eta is 0, or the chain's only step ends clean. "
        "Raise eta or num_inference_steps, or use a differentiable reward with first-order steps."
    )


class RLREstimator(Estimator):
    """Lays out, draws and makes the terms of the estimator.

    Args:
        settings: what the estimator is made of.
        antithetic: samples come in neighbouring pairs with mirrored noises.

    Attributes:
        statistics: of past updates and calibrations, which choose K, the mixture and the window.
    """

    def __init__(self, settings: RLRSettings, antithetic: bool = False) -> None:
        self.settings = settings
        self.antithetic = antithetic
        self.statistics = StepStatistics(settings.state_baseline)
        # Not without first-order steps, unless the gradient decides on a black-box tail.
        self.uses_reward_gradient = settings.first_order_steps != 0 or settings.black_box_steps > 0

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards; `has_gradient` is the reward's, None where that is not known."""
        return self.settings.describe(has_gradient) + ("; antithetic noises" if self.antithetic else "")

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Leave-one-out advantages (N,) of rewards (N,)."""
        return leave_one_out(rewards, group_size, self.antithetic)

    def wants_calibration(self, has_gradient: bool) -> bool:
        """Whether K, the mixture or the window is to be chosen by measurement."""
        return self.settings.measures_window or (self.settings.measures_steps and has_gradient)

    @property
    def is_calibrated(self) -> bool:  # type: ignore[override]
        """Whether the steps have been measured, in this session or before the checkpoint that was loaded."""
        return self.statistics.energies is not None

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], decay: float) -> None:
        """Measures the gains of all steps on rollouts that no update uses, and blends them into the running ones."""
        gradients = measure_step_gradients(chain, rollouts, GradientSketch(chain.parameters))
        _check_gradient(gradients, rollouts)
        self.statistics.calibrate(gradients, decay)

    def learn(self, books: Sequence[Book]) -> None:
        """Blends what a finished update showed into the running statistics."""
        self.statistics.learn(books)

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """What the terms cover in expectation, over K too where it is drawn.

        Raises:
            CoverageError: there is no term for this reward, or a step is not covered as it should be.
        """
        if self.settings.first_order_steps != "random" or not has_gradient:
            return self.layout(chain, has_gradient).coverage
        covered = [self._layout(chain, has_gradient, k, None).coverage for k in range(1, chain.num_steps + 1)]
        weights = torch.stack([coverage.weights for coverage in covered]).mean(0)
        return replace(covered[0], weights=weights, gaps=covered[0].gaps)

    def layout(self, chain: Chain, has_gradient: bool, generator: torch.Generator | None = None) -> Layout:
        """Which term covers which step of one micro-batch; a K that is drawn needs the generator (CPU)."""
        steps, mixture = self._tail(chain.num_steps, generator) if has_gradient else (0, None)
        return self._layout(chain, has_gradient, steps, mixture)

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> Iterator[Segment | Perturbation]:
        """The terms of one micro-batch."""
        c = self.settings.coefficients
        layout = self.layout(chain, rollout.reward_gradient is not None, generator)
        blocks, left = layout.draw(generator)
        if layout.mixture is not None:
            yield mixed_segment(rollout, layout.mixture, c.first_order, c.half_order)
        elif layout.first_order_steps:
            yield first_order_segment(rollout, layout.first_order_steps, c.first_order)
        for t in layout.black_box_steps:
            yield black_box_segment(chain, objective, rollout, t, c.half_order)
        for block, weight in blocks:
            advantages, seen = None, None
            if self.statistics.state_baseline is not None:
                advantages, seen = self.statistics.state_baseline.correct(objective, rollout, block.first_step)
            yield half_order_segment(rollout, block, weight, advantages, seen)
        if left and self.settings.zeroth_order is not None:
            baseline = rollout.rewards - rollout.advantages
            yield Perturbation(frozenset(left), self.settings.zeroth_order, baseline, c.zeroth_order)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, of plain types and tensors."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.statistics.load_state_dict(state)

    def _layout(self, chain: Chain, has_gradient: bool, steps: int, mixture: torch.Tensor | None) -> Layout:
        return lay_out(
            self._with_measured_window(steps if has_gradient else self.settings.black_box_steps),
            chain,
            first_order_steps=steps,
            has_gradient=has_gradient,
            block_norms=self.statistics.block_norms,
            mixture=mixture,
        )

    def _with_measured_window(self, covered_tail: int) -> RLRSettings:
        """The settings with the window of the chosen stage, where it is measured; see ``choose_stage``."""
        half_order = self.settings.half_order
        if half_order is None or not half_order.stage_windows:
            return self.settings
        if self.statistics.energies is None:
            raise RuntimeError("Expected calibrate() before the first update with ho_window auto.")
        stage = choose_stage(half_order.stage_windows, self.statistics.energies, covered_tail)
        return replace(self.settings, half_order=replace(half_order, window=(stage.first, stage.last)))

    def _tail(self, num_steps: int, generator: torch.Generator | None) -> tuple[int, torch.Tensor | None]:
        """K, and the mixture of steps 1..K."""
        chosen = self.settings.first_order_steps
        if chosen == "random":
            return int(torch.randint(1, num_steps + 1, (1,), generator=generator)), None
        if chosen != "auto":
            return min(chosen, num_steps), None
        if self.statistics.variances is None:
            raise RuntimeError("Expected calibrate() before the first update with first_order_steps='auto'.")
        variances = self.statistics.variances.first_order, self.statistics.variances.half_order
        if self.settings.step_choice == "crossing":
            return best_first_order_steps(*variances), None
        weights = inverse_variance_weights(*variances)
        pathwise = weights.nonzero()
        length = int(pathwise.max()) + 1 if len(pathwise) else 0
        return length, None if bool((weights[:length] == 1).all()) else weights[:length]


def _check_gradient(gradients: StepGradients, rollouts: Sequence[Rollout]) -> None:
    """A gradient that is zero everywhere has no variance, and would be chosen for it."""
    rewards = torch.cat([rollout.rewards for rollout in rollouts])
    if gradients.pathwise is not None and not gradients.pathwise.any() and rewards.min() < rewards.max():
        raise CoverageError(
            f"Expected a reward whose gradient is not zero on all {len(rewards)} samples, got zeros although the "
            "rewards differ: it is a step function, rounded or saturated. Declare it with `differentiable = False` on "
            "the callable, or smooth it."
        )
