"""The Recursive Likelihood Ratio (RLR) estimator: first order + half order (+ zeroth order), one sum, one step.

Every step of the chain is covered by exactly one strategy in expectation, so the sum is an unbiased estimate of the
gradient of E[R(x_0)]: the pathwise tail (FO) takes steps 1..K, half-order blocks (HO) or the zeroth order (ZO) the
rest. Full backpropagation, truncated backpropagation and REINFORCE are the special cases K = T, no HO, and K = 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rlr_peft.chain import adjoint
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.black_box_tail import black_box_segment
from rlr_peft.estimators.coverage import Coverage, CoverageError
from rlr_peft.estimators.first_order import first_order_segment
from rlr_peft.estimators.half_order import (
    DEFENSIVE_SHARE,
    Block,
    HalfOrder,
    draw,
    draw_probabilities,
    expected_draws,
    free_blocks,
    half_order_segment,
    tiles,
)
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.planning import crossing
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.estimators.step_variance import StepVariances, measure_step_variances
from rlr_peft.estimators.zeroth_order import ZerothOrder, accumulate_zeroth_order

# A step whose mean moves this much per unit of denoiser output and of its noise makes a score term very noisy.
HOT_STEP = 3.0


@dataclass(frozen=True)
class RLRSettings:
    """What the estimator is made of.

    Attributes:
        first_order_steps: K, or "auto" for the measured crossing of the per-step variances.
        half_order: blocks beyond K; None leaves them to the zeroth order or uncovered.
        zeroth_order: covers what the half order leaves over; None for nothing.
        black_box_steps: steps 1..n that get black-box tail terms when the reward has no gradient.
    """

    first_order_steps: int | Literal["auto"] = "auto"
    half_order: HalfOrder | None = HalfOrder(length=1, blocks="all")
    zeroth_order: ZerothOrder | None = None
    black_box_steps: int = 0


@dataclass(frozen=True)
class Plan:
    """What one micro-batch will do.

    Attributes:
        first_order_steps: K; 0 for none.
        black_box_steps: steps with a black-box tail term.
        blocks: half-order blocks with their weights.
        zeroth_order_steps: steps whose parameters are perturbed.
        coverage: expected weight of every step.
    """

    first_order_steps: int
    black_box_steps: list[int]
    blocks: list[tuple[Block, float]]
    zeroth_order_steps: list[int]
    coverage: Coverage


@dataclass(frozen=True)
class EstimatorReport:
    """What one micro-batch did.

    Attributes:
        plan: the plan that was carried out.
        gradient_norms: Euclidean norms of each term's segments for the mean reward of the micro-batch, summed by term.
        backward_steps: backward passes through a denoiser step, per sample.
    """

    plan: Plan
    gradient_norms: Mapping[str, float] = field(default_factory=dict)
    backward_steps: int = 0


class RLREstimator:
    """Plans and carries out the terms of the estimator; its running statistics come from past updates only.

    Args:
        settings: what the estimator is made of.
        norm_decay: decay of the running gradient norms of gradient-norm sampling.

    Attributes:
        step_variances: running per-step variances, None before the first calibration.
        last_coverage: coverage of the last plan that was carried out, None before.
    """

    def __init__(self, settings: RLRSettings, norm_decay: float = 0.9) -> None:
        self.settings = settings
        self.step_variances: StepVariances | None = None
        self.last_coverage: Coverage | None = None
        self._norm_decay = norm_decay
        self._running_norms: dict[int, float] = {}

    @property
    def needs_calibration(self) -> bool:
        """Whether K is to be chosen by measurement."""
        return self.settings.first_order_steps == "auto"

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], decay: float) -> StepVariances:
        """Measures the per-step variances on rollouts that no update uses, and blends them into the running ones."""
        measured = measure_step_variances(chain, rollouts)
        self.step_variances = measured if self.step_variances is None else self.step_variances.blend(measured, decay)
        return measured

    def plan(self, chain: Chain, differentiable: bool, generator: torch.Generator) -> Plan:
        """Decides which step is covered by what; random draws come from ``generator`` (CPU)."""
        settings, num_steps = self.settings, chain.num_steps
        tail = self._first_order_steps(num_steps) if differentiable else 0
        has_noise = [t for t in range(1, num_steps + 1) if chain.std(t) > 0]
        black_box = [] if differentiable else [t for t in has_noise if t <= settings.black_box_steps]
        weights = torch.zeros(num_steps, dtype=torch.float64)
        weights[:tail] = 1
        for t in black_box:
            weights[t - 1] = 1
        covered = max(tail, settings.black_box_steps if not differentiable else 0)
        blocks: list[tuple[Block, float]] = []
        zeroth: list[int] = []
        if settings.zeroth_order is not None:
            blocks, zeroth, rest = self._free_block_and_complement(chain, covered, generator)
            weights += rest
        elif settings.half_order is not None:
            blocks, expected = self._tiles(chain, covered, generator)
            weights += expected
        if not weights.any():
            raise CoverageError(
                "Expected an estimator with a term for this reward, got none: the reward has no gradient (or K is 0) "
                "and there are no half-order or zeroth-order terms. Use estimator rlr."
            )
        coverage = Coverage(weights, self._gaps(weights, chain))
        coverage.check()
        return Plan(tail, black_box, blocks, zeroth, coverage)

    def accumulate(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> EstimatorReport:
        """Adds the estimated gradient of the micro-batch's SUMMED reward to ``.grad`` of the chain's parameters."""
        plan = self.plan(chain, rollout.reward_gradient is not None, generator)
        self.last_coverage = plan.coverage
        trajectory, batch_size = rollout.trajectory, rollout.trajectory.batch_size
        norms: dict[str, float] = {}
        segments = 0
        if plan.first_order_steps:
            segment = first_order_segment(rollout, plan.first_order_steps)
            norms["first_order"] = adjoint.run(chain, trajectory, segment) / batch_size
            segments += segment.length
        for t in plan.black_box_steps:
            segment = black_box_segment(chain, objective, rollout, t)
            norms["black_box"] = norms.get("black_box", 0.0) + adjoint.run(chain, trajectory, segment) / batch_size
            segments += 1
        for block, weight in plan.blocks:
            norm = adjoint.run(chain, trajectory, half_order_segment(rollout, block, weight)) / batch_size
            self._remember_norm(block.first_step, norm / weight)
            norms["half_order"] = norms.get("half_order", 0.0) + norm
            segments += block.length
        if plan.zeroth_order_steps and self.settings.zeroth_order is not None:
            total = accumulate_zeroth_order(
                chain, objective, rollout, plan.zeroth_order_steps, self.settings.zeroth_order, generator
            )
            norms["zeroth_order"] = total / batch_size
        return EstimatorReport(plan, norms, segments)

    def describe(self) -> str:
        """The terms in words, for logs and cards."""
        settings = self.settings
        tail = "K measured" if settings.first_order_steps == "auto" else f"K = {settings.first_order_steps}"
        terms = [f"first order on steps 1..K, {tail}"]
        if settings.half_order is not None:
            terms.append(settings.half_order.describe())
        if settings.zeroth_order is not None:
            terms.append(
                f"{settings.zeroth_order.form} zeroth order with s = {settings.zeroth_order.scale:g} on the rest"
            )
        return "; ".join(terms)

    def hot_steps(self, chain: Chain, plan: Plan) -> dict[int, float]:
        """``|d mean / d output| / std`` of the score-term steps whose mean reacts too strongly to the denoiser."""
        first_steps = [block.first_step for block, _ in plan.blocks]
        ratios = {t: chain.output_sensitivity(t) / chain.std(t) for t in first_steps}
        return {t: ratio for t, ratio in ratios.items() if ratio > HOT_STEP}

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, of plain types and tensors."""
        variances = self.step_variances
        return {
            "first_order_variances": None if variances is None else variances.first_order,
            "half_order_variances": None if variances is None else variances.half_order,
            "running_norms": dict(self._running_norms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        if state["first_order_variances"] is not None:
            self.step_variances = StepVariances(state["first_order_variances"], state["half_order_variances"])
        self._running_norms = dict(state["running_norms"])

    def _first_order_steps(self, num_steps: int) -> int:
        if self.settings.first_order_steps != "auto":
            return min(self.settings.first_order_steps, num_steps)
        if self.step_variances is None:
            raise RuntimeError("Expected calibrate() before the first update with first_order_steps='auto'.")
        return crossing(self.step_variances.first_order, self.step_variances.half_order)

    def _tiles(
        self, chain: Chain, covered: int, generator: torch.Generator
    ) -> tuple[list[tuple[Block, float]], torch.Tensor]:
        """Blocks that tile the steps beyond ``covered``, all of them or M drawn ones, and their expected weights."""
        half_order = self.settings.half_order
        assert half_order is not None
        noiseless = [t for t in range(1, chain.num_steps + 1) if chain.std(t) == 0]
        blocks = tiles(covered + 1, chain.num_steps, half_order.length, noiseless)
        expected = torch.zeros(chain.num_steps, dtype=torch.float64)
        if not blocks:
            return [], expected
        if half_order.blocks == "all":
            chosen = [(block, 1.0) for block in blocks]
            draws = torch.ones(len(blocks), dtype=torch.float64)
        else:
            probabilities = draw_probabilities(blocks, half_order, self._running_norms, DEFENSIVE_SHARE)
            draws = expected_draws(probabilities, half_order.blocks)
            indices = draw(probabilities, half_order.blocks, generator)
            chosen = [(blocks[i], 1 / float(draws[i])) for i in indices]
        for block, expectation in zip(blocks, draws.tolist(), strict=True):
            if expectation > 0:
                expected[block.first_step - 1 : block.steps[-1]] += expectation * (1 / expectation)
        return chosen, expected

    def _free_block_and_complement(
        self, chain: Chain, covered: int, generator: torch.Generator
    ) -> tuple[list[tuple[Block, float]], list[int], torch.Tensor]:
        """The paper's form: one block anywhere beyond ``covered``, the zeroth order on every other step there."""
        half_order, num_steps = self.settings.half_order, chain.num_steps
        beyond = range(covered + 1, num_steps + 1)
        expected = torch.zeros(num_steps, dtype=torch.float64)
        expected[covered:] = 1  # block and complement share out the steps, whichever block is drawn
        if half_order is None or not beyond:
            return [], list(beyond), expected
        length = min(half_order.length, len(beyond))
        candidates = [b for b in free_blocks(covered + 1, num_steps, length) if chain.std(b.first_step) > 0]
        if not candidates:
            return [], list(beyond), expected
        probabilities = draw_probabilities(candidates, half_order, self._running_norms)
        block = candidates[draw(probabilities, 1, generator)[0]]
        return [(block, 1.0)], [t for t in beyond if t not in block.steps], expected

    def _gaps(self, weights: torch.Tensor, chain: Chain) -> dict[int, str]:
        """Why a step may be left out: only by choice, or because no term exists for it."""
        half_order = self.settings.half_order
        gaps = {}
        for t in [t for t in range(1, chain.num_steps + 1) if weights[t - 1] == 0]:
            if half_order is None:
                gaps[t] = "the gradient is truncated there"
            elif chain.std(t) == 0:
                gaps[t] = "no noise there and no reward gradient"
            elif half_order.start == "window":
                gaps[t] = "outside the chosen window"
        return gaps

    def _remember_norm(self, first_step: int, norm: float) -> None:
        older = self._running_norms.get(first_step, norm)
        self._running_norms[first_step] = self._norm_decay * older + (1 - self._norm_decay) * norm
