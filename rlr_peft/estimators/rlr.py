"""The Recursive Likelihood Ratio (RLR) estimator: first order + half order (+ zeroth order), one sum, one step.

Every step of the chain is covered with weight 1 in expectation, so the sum is an unbiased estimate of the gradient of
E[R(x_0)]: the pathwise tail (FO) takes steps 1..K, half-order blocks (HO) or the zeroth order (ZO) the rest. Full
backpropagation, truncated backpropagation and REINFORCE are the special cases K = T, no HO, and K = 0.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.plan import Plan, RLRSettings, make_plan
from rlr_peft.estimators.planning import best_first_order_steps, inverse_variance_weights
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.estimators.signal_sizes import SignalSizes, watched
from rlr_peft.estimators.stage_window import has_measured_window, step_energies, with_measured_window
from rlr_peft.estimators.state_baseline import BaselineObservation, StateBaseline
from rlr_peft.estimators.step_gains import StepGains, calibration_sizes, step_gains
from rlr_peft.estimators.step_gradients import StepGradients, StepVariances, measure_step_gradients
from rlr_peft.estimators.zeroth_order import accumulate_zeroth_order

# A step whose mean moves this much per unit of denoiser output and of its noise makes a score term very noisy.
HOT_STEP = 3.0
NORM_DECAY = 0.9
# Rare samples must not be forgotten soon, the rewards of much weaker weights should be.
SIZE_DECAY = 0.99


@dataclass
class RLRMemory:
    """What one micro-batch teaches the next updates.

    Attributes:
        block_norms: first step and unweighted gradient norm of every half-order block.
        baselines: observations of the state baseline.
        sizes: of advantages and cotangents; None unless K is measured.
    """

    block_norms: list[tuple[int, float]] = field(default_factory=list)
    baselines: list[BaselineObservation] = field(default_factory=list)
    sizes: SignalSizes | None = None


class RLREstimator:
    """Plans and carries out the terms of the estimator; its running statistics come from past updates only.

    Args:
        settings: what the estimator is made of.
        antithetic: samples come in neighbouring pairs with mirrored noises.

    Attributes:
        step_variances: running variances of the terms, which choose K; None before the first calibration.
        step_energies: running gradient energies of the steps, (T,), which choose the window; None before as well.
    """

    inner_epochs = 1

    def __init__(self, settings: RLRSettings, antithetic: bool = False) -> None:
        self.settings = settings
        self.antithetic = antithetic
        self.step_variances: StepVariances | None = None
        self.step_energies: torch.Tensor | None = None
        self._step_gains: StepGains | None = None
        self._signal_sizes = SignalSizes()
        self._running_norms: dict[int, float] = {}
        self._state_baseline = StateBaseline() if settings.state_baseline else None

    def describe(self) -> str:
        """The terms in words, for logs and cards."""
        return self.settings.describe() + ("; antithetic noises" if self.antithetic else "")

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

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], decay: float) -> None:
        """Measures the gains of all steps on rollouts that no update uses, and blends them into the running ones."""
        gradients = measure_step_gradients(chain, rollouts, GradientSketch(chain.parameters))
        _check_gradient(gradients, rollouts)
        measured = step_gains(gradients)
        self._step_gains = measured if self._step_gains is None else self._step_gains.blend(measured, decay)
        energies = step_energies(gradients)
        older = energies if self.step_energies is None else self.step_energies
        self.step_energies = decay * older + (1 - decay) * energies
        self._see([calibration_sizes(gradients)])

    def observe(self, prompts: Sequence[str], rewards: torch.Tensor) -> None:
        """Nothing to learn from other processes: advantages are taken within a prompt's own samples."""

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Leave-one-out advantages (N,) of rewards (N,)."""
        return leave_one_out(rewards, group_size, self.antithetic)

    def remember(self, memories: Iterable[RLRMemory]) -> None:
        """Blends what a finished update saw, in all micro-batches and processes, into the running statistics."""
        by_step: defaultdict[int, list[float]] = defaultdict(list)
        baselines: list[BaselineObservation] = []
        sizes: list[SignalSizes] = []
        for memory in memories:
            baselines += memory.baselines
            if memory.sizes is not None:
                sizes.append(memory.sizes)
            for first_step, norm in memory.block_norms:
                by_step[first_step].append(norm)
        for first_step, norms in by_step.items():
            newer = sum(norms) / len(norms)
            older = self._running_norms.get(first_step, newer)
            self._running_norms[first_step] = NORM_DECAY * older + (1 - NORM_DECAY) * newer
        if self._state_baseline is not None:
            self._state_baseline.remember(baselines)
        if sizes:
            self._see(sizes)

    def plan(self, chain: Chain, differentiable: bool, generator: torch.Generator) -> Plan:
        """Decides which step is covered by what; random draws come from ``generator`` (CPU)."""
        steps, mixture = self._tail(chain.num_steps, generator) if differentiable else (0, None)
        return make_plan(
            with_measured_window(self.settings, self.step_energies, steps if differentiable else 0),
            chain,
            first_order_steps=steps,
            differentiable=differentiable,
            running_norms=self._running_norms,
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
        return {
            "step_gains": None if self._step_gains is None else dict(vars(self._step_gains)),
            "step_energies": self.step_energies,
            "signal_sizes": self._signal_sizes.state_dict(),
            "running_norms": dict(self._running_norms),
            "state_baseline": None if self._state_baseline is None else self._state_baseline.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.step_energies = state.get("step_energies")
        if state["step_gains"] is not None:
            self._step_gains = StepGains(**state["step_gains"])
            self._signal_sizes = SignalSizes.from_state_dict(state["signal_sizes"])
            self.step_variances = self._step_gains.variances(self._signal_sizes)
        self._running_norms = dict(state["running_norms"])
        if self._state_baseline is not None and state["state_baseline"] is not None:
            self._state_baseline.load_state_dict(state["state_baseline"])

    @property
    def _measures_steps(self) -> bool:
        """Whether K, or the mixture, is to be chosen by measurement."""
        return self.settings.first_order_steps == "auto"

    def _see(self, sizes: Iterable[SignalSizes]) -> None:
        """Learns from the samples of one update or calibration how large signals are."""
        self._signal_sizes = self._signal_sizes.blend(sizes, SIZE_DECAY)
        if self._step_gains is not None:
            self.step_variances = self._step_gains.variances(self._signal_sizes)

    def _score_advantages(
        self, objective: Objective, rollout: Rollout, t: int, memory: RLRMemory
    ) -> torch.Tensor | None:
        if self._state_baseline is None:
            return None
        advantages, observation = self._state_baseline.correct(objective, rollout, t)
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


def hot_steps(chain: Chain, plan: Plan) -> dict[int, float]:
    """``|d mean / d output| / std`` of the score-term steps whose mean reacts too strongly to the denoiser."""
    mixed = [] if plan.mixture is None else [int(i) + 1 for i in (plan.mixture < 1).nonzero()]
    score_steps = [*mixed, *(block.first_step for block, _ in plan.blocks)]
    ratios = {t: chain.output_sensitivity(t) / chain.std(t) for t in score_steps}
    return {t: ratio for t, ratio in ratios.items() if ratio > HOT_STEP}
