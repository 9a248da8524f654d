"""The Recursive Likelihood Ratio (RLR) estimator: first order + half order (+ zeroth order), one sum, one step.

Every step of the chain is covered with weight 1 in expectation, so the sum is an unbiased estimate of the gradient of
E[R(x_0)]: the pathwise tail (FO) takes steps 1..K, half-order blocks (HO) or the zeroth order (ZO) the rest. Full
backpropagation, truncated backpropagation and REINFORCE are the special cases K = T, no HO, and K = 0.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from rlr_peft.chain import adjoint
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.black_box_tail import black_box_segment
from rlr_peft.estimators.coverage import CoverageError
from rlr_peft.estimators.estimator import EstimatorReport
from rlr_peft.estimators.first_order import first_order_segment, mixed_segment
from rlr_peft.estimators.gradient_sketch import GradientSketch
from rlr_peft.estimators.half_order import half_order_segment
from rlr_peft.estimators.hot_steps import hot_steps
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.plan import Plan, make_plan
from rlr_peft.estimators.planning import best_first_order_steps, inverse_variance_weights
from rlr_peft.estimators.rlr_settings import RLRSettings
from rlr_peft.estimators.rlr_statistics import RLRMemory, RLRStatistics
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.estimators.signal_sizes import SignalSizes, watched
from rlr_peft.estimators.stage_window import has_measured_window, with_measured_window
from rlr_peft.estimators.step_gradients import StepGradients, StepVariances, measure_step_gradients
from rlr_peft.estimators.zeroth_order import accumulate_zeroth_order


class RLREstimator:
    """Plans and carries out the terms of the estimator; its running statistics come from past updates only.

    Args:
        settings: what the estimator is made of.
        antithetic: samples come in neighbouring pairs with mirrored noises.
    """

    inner_epochs = 1

    def __init__(self, settings: RLRSettings, antithetic: bool = False) -> None:
        self.settings = settings
        self.antithetic = antithetic
        self._statistics = RLRStatistics(settings.state_baseline)

    @property
    def step_variances(self) -> StepVariances | None:
        """Running variances of the terms, which choose K; None before the first calibration."""
        return self._statistics.step_variances

    @step_variances.setter
    def step_variances(self, variances: StepVariances | None) -> None:
        self._statistics.step_variances = variances

    @property
    def step_energies(self) -> torch.Tensor | None:
        """Running gradient energies of the steps, (T,), which choose the window; None before the first calibration."""
        return self._statistics.step_energies

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards; `has_gradient` is the reward's, None where that is not known."""
        return self.settings.describe(has_gradient) + ("; antithetic noises" if self.antithetic else "")

    @property
    def uses_reward_gradient(self) -> bool:
        """Not without first-order steps, unless the gradient decides on a black-box tail."""
        return self.settings.first_order_steps != 0 or self.settings.black_box_steps > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether K, the mixture or the window is to be chosen by measurement."""
        return self._measures_steps or has_measured_window(self.settings)

    @property
    def calibrates_without_gradient(self) -> bool:
        """Whether a reward without gradient still leaves something to choose: the window."""
        return has_measured_window(self.settings)

    @property
    def is_calibrated(self) -> bool:
        """Whether the steps have been measured, in this session or before the checkpoint that was loaded."""
        return self.step_energies is not None

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], decay: float) -> None:
        """Measures the gains of all steps on rollouts that no update uses, and blends them into the running ones."""
        gradients = measure_step_gradients(chain, rollouts, GradientSketch(chain.parameters))
        _check_gradient(gradients, rollouts)
        self._statistics.calibrate(gradients, decay)

    def observe(self, prompts: Sequence[str], rewards: torch.Tensor) -> None:
        """Nothing to learn from other processes: advantages are taken within a prompt's own samples."""

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Leave-one-out advantages (N,) of rewards (N,)."""
        return leave_one_out(rewards, group_size, self.antithetic)

    def remember(self, memories: Iterable[RLRMemory]) -> None:
        """Blends what a finished update saw, in all micro-batches and processes, into the running statistics."""
        self._statistics.remember(memories)

    def plan(self, chain: Chain, differentiable: bool, generator: torch.Generator) -> Plan:
        """Decides which step is covered by what; random draws come from ``generator`` (CPU)."""
        steps, mixture = self._tail(chain.num_steps, generator) if differentiable else (0, None)
        covered_tail = steps if differentiable else self.settings.black_box_steps
        return make_plan(
            with_measured_window(self.settings, self.step_energies, covered_tail),
            chain,
            first_order_steps=steps,
            differentiable=differentiable,
            running_norms=self._statistics.block_norms,
            generator=generator,
            mixture=mixture,
        )

    def accumulate(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> EstimatorReport:
        """Adds the estimated gradient of the micro-batch's SUMMED reward to ``.grad`` of the chain's parameters."""
        plan = self.plan(chain, rollout.reward_gradient is not None, generator)
        coefficients, batch_size = self.settings.coefficients, rollout.trajectory.batch_size
        norms: defaultdict[str, float] = defaultdict(float)
        memory = RLRMemory()
        backward_steps = 0
        squares: list[float] = []

        def pull_back(segment: adjoint.Segment, term: str) -> float:
            nonlocal backward_steps
            if self._measures_steps and term in ("first_order", "mixed_order"):
                segment = watched(segment, squares)
            norm = adjoint.run(chain, rollout.trajectory, segment) / batch_size
            norms[term] += norm
            backward_steps += segment.length
            return norm

        if plan.mixture is not None:
            mixed = mixed_segment(rollout, plan.mixture, coefficients.first_order, coefficients.half_order)
            pull_back(mixed, "mixed_order")
            # two passes where another cotangent goes into the parameters than travels on
            differs = (plan.mixture < 1) | (coefficients.first_order != 1)
            backward_steps += int(differs[:-1].sum())
        elif plan.first_order_steps:
            pull_back(first_order_segment(rollout, plan.first_order_steps, coefficients.first_order), "first_order")
        for t in plan.black_box_steps:
            pull_back(black_box_segment(chain, objective, rollout, t, coefficients.half_order), "black_box")
        for block, weight in plan.blocks:
            advantages = self._score_advantages(objective, rollout, block.first_step, memory)
            norm = pull_back(half_order_segment(rollout, block, weight, advantages), "half_order")
            memory.block_norms.append((block.first_step, norm / weight if weight else 0.0))
        if plan.zeroth_order_steps and self.settings.zeroth_order is not None:
            norm = accumulate_zeroth_order(
                chain,
                objective,
                rollout,
                plan.zeroth_order_steps,
                self.settings.zeroth_order,
                generator,
                coefficients.zeroth_order,
            )
            norms["zeroth_order"] = norm / batch_size
        if self._measures_steps:
            if not squares and rollout.reward_gradient is not None:  # K = 0: no walk passed the reward's own gradient
                squares.append(float(rollout.reward_gradient.double().square().sum()))
            memory.sizes = SignalSizes.of_walk(rollout.advantages, squares)
        return EstimatorReport(
            coverage=plan.coverage,
            gradient_norms=dict(norms),
            backward_steps=backward_steps,
            first_order_steps=plan.first_order_steps,
            hot_steps=hot_steps(chain, plan),
            memory=memory,
        )

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, of plain types and tensors."""
        return self._statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._statistics.load_state_dict(state)

    @property
    def _measures_steps(self) -> bool:
        """Whether K, or the mixture, is to be chosen by measurement."""
        return self.settings.first_order_steps == "auto"

    def _score_advantages(
        self, objective: Objective, rollout: Rollout, t: int, memory: RLRMemory
    ) -> torch.Tensor | None:
        if self._statistics.state_baseline is None:
            return None
        advantages, observation = self._statistics.state_baseline.correct(objective, rollout, t)
        memory.baselines.append(observation)
        return advantages

    def _tail(self, num_steps: int, generator: torch.Generator) -> tuple[int, torch.Tensor | None]:
        """K, and the mixture of steps 1..K."""
        chosen = self.settings.first_order_steps
        if chosen == "random":
            return int(torch.randint(1, num_steps + 1, (1,), generator=generator)), None
        if chosen != "auto":
            return min(chosen, num_steps), None
        if self.step_variances is None:
            raise RuntimeError("Expected calibrate() before the first update with first_order_steps='auto'.")
        variances = self.step_variances.first_order, self.step_variances.half_order
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
