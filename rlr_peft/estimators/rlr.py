"""The Recursive Likelihood Ratio (RLR) estimator: first order + half order (+ zeroth order), one sum, one step.

Every step of the chain is covered with weight 1 in expectation, so the sum is an unbiased estimate of the gradient of
E[R(x_0)]: the pathwise tail (FO) takes steps 1..K, half-order blocks (HO) or the zeroth order (ZO) the rest. Full
backpropagation and REINFORCE are the special cases K = T and K = 0.

With a roulette every sample is walked back a random number of steps, and what is walked counts for the rest:
``sum_t 1[K >= t] / q_t G_t`` with ``q_t = P(K >= t)`` has the expectation of full backpropagation, ``sum_t G_t``, at
the price of ``E[K] = sum_t q_t`` steps (Russian roulette; for optimisation Beatson and Adams, ICML 2019). With
``R_t = G_t + G_{t+1} + ...`` its second moment is

    E |g|^2 = sum_t beta_t / q_t,        beta_t = E |R_t|^2 - E |R_{t+1}|^2

so that measured gradients tell the best q.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from scipy.optimize import isotonic_regression

from rlr_peft.chain.adjoint import Segment
from rlr_peft.chain.steps import Chain
from rlr_peft.config.estimator import CalibratedArguments
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.base import FIRST_ORDER, MIXED_ORDER, Book, Coverage, Estimator, RunShape
from rlr_peft.estimators.half_order import black_box_segment, choose_stage, half_order_segment
from rlr_peft.estimators.layout import Layout, RLRSettings, lay_out, settings_from_arguments
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.estimators.step_gradients import GradientSketch, check_gradient, measure_step_gradients
from rlr_peft.estimators.variance import GradientMoments, StepStatistics
from rlr_peft.estimators.zeroth_order import Perturbation

# No step is walked more rarely: weights stay below 1 / this where few measured samples showed nothing.
SMALLEST_PROBABILITY = 0.05
# Factors of sqrt(beta) that are tried; q_t is at most 1.
FACTORS = torch.logspace(-3, 3, 601, dtype=torch.float64)
# A walked step is replayed once and pulled back once, a backward pass counting as two forward ones.
STEP_COST = 3.0


class RLREstimator(Estimator):
    """Lays out, draws and makes the terms of the estimator.

    Args:
        settings: what the estimator is made of.
        antithetic: samples come in neighbouring pairs with antithetic noise.
        samples: B, of an update; the roulette's chances depend on it.

    Attributes:
        statistics: of past updates and calibrations, which choose K, the mixture and the window.
    """

    def __init__(self, settings: RLRSettings, antithetic: bool = False, samples: int = 1) -> None:
        self.settings = settings
        self.antithetic = antithetic
        self.samples = samples
        self.statistics = StepStatistics(settings.state_baseline)
        # Not without first-order steps, unless the gradient decides on a black-box tail.
        self.uses_reward_gradient = settings.first_order_steps != 0 or settings.black_box_steps > 0

    @classmethod
    def from_arguments(cls, arguments: CalibratedArguments, shape: RunShape) -> Self:
        return cls(settings_from_arguments(arguments, shape), arguments.antithetic, shape.samples)

    def describe(self, has_gradient: bool | None = None) -> str:
        return self.settings.describe(has_gradient) + ("; antithetic noises" if self.antithetic else "")

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        return leave_one_out(rewards, group_size, self.antithetic)

    def compares_images(self, chain: Chain, has_gradient: bool) -> bool:
        """Where a term is weighted with advantages; until K is measured none is expected to be."""
        if not has_gradient or self.antithetic:
            return True
        if self.wants_calibration(has_gradient) and not self.is_calibrated:
            return False
        return self.layout(chain, has_gradient).uses_advantages

    def wants_calibration(self, has_gradient: bool) -> bool:
        """Whether K, the mixture or the window is to be chosen by measurement."""
        return self.settings.measures_window or (self.settings.measures_steps and has_gradient)

    @property
    def is_calibrated(self) -> bool:  # type: ignore[override]
        """Whether the steps have been measured, in this session or before the checkpoint that was loaded."""
        return self.statistics.energies is not None

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], advantages: torch.Tensor, decay: float) -> None:
        """Measures the gains of all steps on rollouts that no update uses, and blends them into the running ones."""
        sketch = GradientSketch(chain.parameters)
        gradients = measure_step_gradients(chain, rollouts, advantages, sketch, description="Calibrating")
        check_gradient(gradients, rollouts)
        self.statistics.calibrate(gradients, decay)

    def learn(self, books: Sequence[Book]) -> None:
        self.statistics.learn(books)

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """What the terms cover in expectation, over K too where it is drawn.

        Raises:
            CoverageError: there is no term for this reward, or a step is not covered as it should be.
        """
        return self.layout(chain, has_gradient).coverage

    def layout(self, chain: Chain, has_gradient: bool) -> Layout:
        """Which term covers which step of one micro-batch."""
        steps, mixture = self._tail(chain.num_steps) if has_gradient else (0, None)
        return lay_out(
            self._with_measured_window(steps if has_gradient else self.settings.black_box_steps),
            chain,
            first_order_steps=steps,
            has_gradient=has_gradient,
            block_norms=self.statistics.block_norms,
            mixture=mixture,
        )

    def walks_by_roulette(self, chain: Chain, length: int) -> bool:
        """Whether samples are walked through a random number of steps 1..K, for K = ``length``.

        Not where a sample's step depends on its batch: none could be left out of it, so that nothing would be saved.
        """
        return self.settings.roulette and length > 1 and not chain.mixes_samples

    def roulette(self, chain: Chain, length: int) -> torch.Tensor:
        """The chances q_t of steps 1..K, (K,), for K = ``length``."""
        if self.statistics.moments is None:
            raise RuntimeError("Expected calibrate() before the first update with a roulette.")
        return roulette_probabilities(self.statistics.moments.first(length), self.samples, chain.num_steps)

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterator[Segment | Perturbation]:
        c = self.settings.coefficients
        layout = self.layout(chain, rollout.reward_gradient is not None)
        blocks, left = layout.draw(generator)
        if layout.mixture is not None:
            yield mixed_segment(rollout, advantages, layout.mixture, c.first_order, c.half_order)
        elif layout.first_order_steps:
            length, walked = layout.first_order_steps, None
            if self.walks_by_roulette(chain, length):
                walked = roulette_weights(self.roulette(chain, length), len(rollout.rewards), generator)
            yield Segment(FIRST_ORDER, range(1, length + 1), rollout.reward_gradient, c.first_order, walked)
        for t in layout.black_box_steps:
            yield black_box_segment(chain, objective, rollout, t, c.half_order)
        for block, weight in blocks:
            corrected, seen = advantages, None
            if self.statistics.state_baseline is not None:
                corrected, seen = self.statistics.state_baseline.correct(objective, rollout, advantages, block[0])
            yield half_order_segment(rollout, block, corrected, weight, seen)
        if left and self.settings.zeroth_order is not None:
            baseline = rollout.rewards - advantages
            yield Perturbation(frozenset(left), self.settings.zeroth_order, baseline, c.zeroth_order)

    def state_dict(self) -> dict[str, Any]:
        return self.statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.statistics.load_state_dict(state)

    def _with_measured_window(self, covered_tail: int) -> RLRSettings:
        """The settings with the window of the chosen stage, where it is measured; see ``choose_stage``."""
        half_order = self.settings.half_order
        if half_order is None or not half_order.stage_windows:
            return self.settings
        if self.statistics.energies is None:
            raise RuntimeError("Expected calibrate() before the first update with ho_window auto.")
        stage = choose_stage(half_order.stage_windows, self.statistics.energies, covered_tail)
        return replace(self.settings, half_order=replace(half_order, window=(stage.first, stage.last)))

    def _tail(self, num_steps: int) -> tuple[int, torch.Tensor | None]:
        """K, and the mixture of steps 1..K."""
        chosen = self.settings.first_order_steps
        if chosen != "auto":
            return min(chosen, num_steps), None
        return self.statistics.tail(self.settings.step_choice)


def mixed_segment(
    rollout: Rollout,
    advantages: torch.Tensor,
    mixture: torch.Tensor,
    first_order: float = 1.0,
    half_order: float = 1.0,
) -> Segment:
    """First and half order mixed in one walk: ``w_t c_t + (1 - w_t) A eps_t / sigma_t`` goes into the parameters.

    The pathwise cotangent c_t travels on as ever, so both parts of every step are exact and cover it with weight 1.

    Args:
        rollout: must hold the reward's gradient.
        advantages: A, (B,).
        mixture: w_t of steps 1..K, (K,), in [0, 1]; 1 where a step has no noise.
    """

    def into_parameters(
        t: int, mean: torch.Tensor, cotangent: torch.Tensor | None
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        assert cotangent is not None  # it starts as the reward's gradient
        share = float(mixture[t - 1])
        if share == 1 and first_order == 1:
            return cotangent, {}
        mixed = first_order * share * cotangent
        return (mixed if share == 1 else mixed + half_order * (1 - share) * rollout.score_cotangent(t, advantages)), {}

    return Segment(
        MIXED_ORDER,
        range(1, len(mixture) + 1),
        rollout.reward_gradient,
        into_parameters=into_parameters,
        score_steps=tuple(int(i) + 1 for i in (mixture < 1).nonzero()),
    )


def roulette_weights(probabilities: torch.Tensor, samples: int, generator: torch.Generator) -> torch.Tensor:
    """``1[K_i >= t] / q_t`` of every sample at every step.

    The draws are stratified: a sample of random rank r is walked to step t if ``(r + u) / B < q_t``, one u for all.

    Args:
        probabilities: q_t at index t - 1, in (0, 1], not increasing, q_1 = 1; (T,).
        samples: B.
        generator: of the draws, on the CPU.

    Returns:
        (T, B), float64.
    """
    ranks = torch.randperm(samples, generator=generator).double()
    places = (ranks + torch.rand((), generator=generator, dtype=torch.float64)) / samples
    probabilities = probabilities.double()[:, None]
    return (places < probabilities) / probabilities


def roulette_probabilities(moments: GradientMoments, samples: int, fixed_cost: float) -> torch.Tensor:
    """The q_t that minimise ``sqrt(E |mean of B g|^2) * cost``: the most improvement per cost, see ``auto``.

    Args:
        moments: of the gradients G_1..G_T.
        samples: B, of an update.
        fixed_cost: of a sample without its walk, in denoiser evaluations.

    Returns:
        (T,), float64, in [SMALLEST_PROBABILITY, 1], not increasing, 1 at step 1.
    """
    beta = moments.products.diagonal() + 2 * moments.products.triu(1).sum(1)
    # Steps whose beta rises with t cannot be told apart by a q that does not: they share the mean of theirs.
    pooled = torch.tensor(isotonic_regression(beta.numpy(), increasing=False).x.copy()).clamp(min=0)
    candidates = (FACTORS[:, None] * pooled.sqrt()).clamp(SMALLEST_PROBABILITY, 1)
    candidates[:, 0] = 1
    single = (pooled / candidates).sum(1)
    expected = moments.means.sum().clamp(min=0)
    squares = expected + (single - expected).clamp(min=0) / samples
    costs = fixed_cost + STEP_COST * candidates.sum(1)
    return candidates[int((squares.sqrt() * costs).argmin())]
