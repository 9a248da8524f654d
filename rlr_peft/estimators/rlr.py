"""The Recursive Likelihood Ratio (RLR) estimator: first order + half order (+ zeroth order), one sum, one step.

Every step of the chain is covered with weight 1 in expectation, so the sum is an unbiased estimate of the gradient of
E[R(x_0)]: the pathwise tail (FO) takes steps 1..K, half-order blocks (HO) or the zeroth order (ZO) the rest. Full
backpropagation, truncated backpropagation and REINFORCE are the special cases K = T, no HO, and K = 0.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlr_peft.chain import adjoint
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.black_box_tail import black_box_segment
from rlr_peft.estimators.first_order import first_order_segment
from rlr_peft.estimators.half_order import half_order_segment
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.plan import Plan, RLRSettings, make_plan
from rlr_peft.estimators.planning import crossing
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.estimators.step_variance import StepVariances, measure_step_variances
from rlr_peft.estimators.zeroth_order import accumulate_zeroth_order

# A step whose mean moves this much per unit of denoiser output and of its noise makes a score term very noisy.
HOT_STEP = 3.0


@dataclass(frozen=True)
class EstimatorReport:
    """What one micro-batch did.

    Attributes:
        plan: the plan that was carried out.
        gradient_norms: Euclidean norms of each term's segments for the mean reward of the micro-batch, summed by term.
        block_norms: first step and unweighted gradient norm of every half-order block.
        backward_steps: backward passes through a denoiser step, per sample.
    """

    plan: Plan
    gradient_norms: Mapping[str, float]
    block_norms: Sequence[tuple[int, float]]
    backward_steps: int


class RLREstimator:
    """Plans and carries out the terms of the estimator; its running statistics come from past updates only.

    Args:
        settings: what the estimator is made of.
        norm_decay: decay of the running gradient norms of gradient-norm sampling.

    Attributes:
        step_variances: running per-step variances, None before the first calibration.
    """

    def __init__(self, settings: RLRSettings, norm_decay: float = 0.9) -> None:
        self.settings = settings
        self.step_variances: StepVariances | None = None
        self._norm_decay = norm_decay
        self._running_norms: dict[int, float] = {}

    @property
    def needs_calibration(self) -> bool:
        """Whether K is to be chosen by measurement."""
        return self.settings.first_order_steps == "auto"

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], decay: float) -> None:
        """Measures the per-step variances on rollouts that no update uses, and blends them into the running ones."""
        measured = measure_step_variances(chain, rollouts)
        self.step_variances = measured if self.step_variances is None else self.step_variances.blend(measured, decay)

    def remember(self, block_norms: Iterable[tuple[int, float]]) -> None:
        """Blends the block norms of a finished update, of all micro-batches and processes, into the running ones."""
        by_step: defaultdict[int, list[float]] = defaultdict(list)
        for first_step, norm in block_norms:
            by_step[first_step].append(norm)
        for first_step, norms in by_step.items():
            newer = sum(norms) / len(norms)
            older = self._running_norms.get(first_step, newer)
            self._running_norms[first_step] = self._norm_decay * older + (1 - self._norm_decay) * newer

    def plan(self, chain: Chain, differentiable: bool, generator: torch.Generator) -> Plan:
        """Decides which step is covered by what; random draws come from ``generator`` (CPU)."""
        return make_plan(
            self.settings,
            chain,
            first_order_steps=self._first_order_steps(chain.num_steps) if differentiable else 0,
            differentiable=differentiable,
            running_norms=self._running_norms,
            generator=generator,
        )

    def accumulate(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> EstimatorReport:
        """Adds the estimated gradient of the micro-batch's SUMMED reward to ``.grad`` of the chain's parameters."""
        plan = self.plan(chain, rollout.reward_gradient is not None, generator)
        norms: defaultdict[str, float] = defaultdict(float)
        block_norms: list[tuple[int, float]] = []
        backward_steps = 0

        def pull_back(segment: adjoint.Segment, term: str) -> float:
            nonlocal backward_steps
            norm = adjoint.run(chain, rollout.trajectory, segment) / rollout.trajectory.batch_size
            norms[term] += norm
            backward_steps += segment.length
            return norm

        if plan.first_order_steps:
            pull_back(first_order_segment(rollout, plan.first_order_steps), "first_order")
        for t in plan.black_box_steps:
            pull_back(black_box_segment(chain, objective, rollout, t), "black_box")
        for block, weight in plan.blocks:
            norm = pull_back(half_order_segment(rollout, block, weight), "half_order")
            block_norms.append((block.first_step, norm / weight))
        if plan.zeroth_order_steps and self.settings.zeroth_order is not None:
            norm = accumulate_zeroth_order(
                chain, objective, rollout, plan.zeroth_order_steps, self.settings.zeroth_order, generator
            )
            norms["zeroth_order"] = norm / rollout.trajectory.batch_size
        return EstimatorReport(plan, dict(norms), block_norms, backward_steps)

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
