"""Measured variances against the estimates that they speak of, and the K that follows from them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from rlr_peft.estimators.coverage import CoverageError
from rlr_peft.estimators.gradient_sketch import GradientSketch
from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.plan import RLRSettings
from rlr_peft.estimators.planning import best_first_order_steps
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.estimators.step_gradients import (
    StepGradients,
    StepVariances,
    measure_step_gradients,
    step_variances,
    variance_and_error,
)
from rlr_peft.testing.linear_gaussian_chain import LinearGaussianChain, QuadraticReward, WaveReward
from tests.estimators.chains import flat, gradient_of, rollout_of

SINGLE = HalfOrder(1, "all")


def measured(chain: LinearGaussianChain, rollouts: Sequence[Rollout]) -> StepVariances:
    return step_variances(measure_step_gradients(chain, rollouts, GradientSketch(chain.parameters)))


def estimates(chain: LinearGaussianChain, objective: Objective, rollout: Rollout, k: int) -> torch.Tensor:
    """The estimate of every single sample with K = k and score terms beyond, (N, number of parameters)."""
    estimator = RLREstimator(RLRSettings(k, SINGLE))
    gradients = []
    for i in range(len(rollout.rewards)):
        estimator.accumulate(chain, objective, rollout.select([i]), torch.Generator())
        gradients.append(gradient_of(chain))
    return torch.stack(gradients)


def test_step_variances_are_those_of_single_sample_gradients() -> None:
    chain = LinearGaussianChain(num_steps=4)
    objective = QuadraticReward(chain)
    rollout = rollout_of(chain, 12, 4)
    variances = measured(chain, [rollout.select(list(range(8))), rollout.select(list(range(8, 12)))])
    assert variances.half_order[0] == torch.inf  # sigma_1 = 0
    pathwise = [estimates(chain, objective, replace(rollout, advantages=torch.zeros(12)), k) for k in range(1, 5)]
    for t in range(1, 5):
        through_t = pathwise[t - 1] - (pathwise[t - 2] if t > 1 else 0)  # FO_K covers steps 1..K
        assert float(variances.first_order[t - 1]) == pytest.approx(float(through_t.var(0).sum()), rel=1e-5)
    for t in range(2, 5):
        score = []
        for i in range(12):
            sample = rollout.select([i])
            value = (chain.replay(sample.trajectory, t).mean * sample.score_cotangent(t)).sum()
            score.append(flat(torch.autograd.grad(value, chain.parameters)))
        assert float(variances.half_order[t - 1]) == pytest.approx(float(torch.stack(score).var(0).sum()), rel=1e-5)


@pytest.mark.parametrize("last_std", [0.0, 0.2])
def test_the_combined_variance_is_that_of_the_whole_estimate_plus_its_standard_error(last_std: float) -> None:
    chain = LinearGaussianChain(num_steps=4, last_std=last_std)
    rollout = rollout_of(chain, 12, 4)
    variances = measured(chain, [rollout])
    if last_std == 0:
        assert variances.combined[0] == torch.inf, "step 1 has no score term"
    for k in range(1 if last_std == 0 else 0, 5):
        whole = estimates(chain, QuadraticReward(chain), rollout, k)
        squares = (whole - whole.mean(0)).square().sum(1) * 12 / 11
        bound = whole.var(0).sum() + squares.std() / 12**0.5
        assert float(variances.combined[k]) == pytest.approx(float(bound), rel=1e-5)
    # the pathwise gradients of different steps are correlated: the sum of their variances would mislead
    assert float(whole.var(0).sum()) > 2 * float(variances.first_order.sum())


def test_a_contracting_chain_is_backpropagated_as_a_whole() -> None:
    chain = LinearGaussianChain(decay=(0.5, 0.3))
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    estimator.calibrate(chain, [rollout_of(chain, 64, 4)], decay=0.0)
    assert estimator.plan(chain, True, torch.Generator()).first_order_steps == 6


def test_the_early_steps_of_a_chaotic_chain_are_left_to_score_terms() -> None:
    """The chain amplifies at its noisy end and contracts at its clean end: K stops between, and rightly so."""
    chain = LinearGaussianChain(decay=(0.5, 3.0))
    objective = WaveReward(chain)
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    estimator.calibrate(chain, [rollout_of(chain, 64, 4, objective=objective)], decay=0.0)
    best = estimator.plan(chain, True, torch.Generator()).first_order_steps
    assert 1 < best < 6
    fresh = rollout_of(chain, 64, 4, seed=1000, objective=objective)
    variance = {k: float(estimates(chain, objective, fresh, k).var(0).sum()) for k in (1, best, 6)}
    assert variance[best] < 0.2 * variance[1] and variance[best] < 0.8 * variance[6]


def test_one_standard_error_keeps_a_heavy_tail_from_winning() -> None:
    """One enormous sample in 16 may hide in a small measured variance, but not in its bound."""
    samples, dimension = 16, 4
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, samples, dimension, generator=generator)
    heavy = torch.zeros(2, samples, dimension)
    heavy[1, 0, 0] = 8.0
    gradients = StepGradients(heavy, scores, torch.ones(samples), torch.tensor([False, True]))
    variances = step_variances(gradients)
    plain = [variance_and_error(gradients.pathwise[0] + last)[0] for last in (scores[1], heavy[1])]
    assert plain[1] == pytest.approx(64 / samples)  # v^2 (1 - 1/N) N / (N - 1) / N
    assert plain[0] > plain[1], "by its variance alone the heavy tail would win"
    assert variances.combined[1] < variances.combined[2], "with its error it does not"
    assert best_first_order_steps(variances.combined) == 1
    # one sample makes up the variance: the error is nearly as large
    assert float(variances.combined[2] / plain[1]) == pytest.approx(2, abs=0.15)


def test_no_k_leaves_a_noiseless_step_to_score_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 1e-3 * torch.randn(6, 16, 4, generator=generator)
    pathwise = torch.randn(6, 16, 4, generator=generator)
    noisy = torch.tensor([True, True, True, False, True, True])
    variances = step_variances(StepGradients(pathwise, scores, torch.ones(16), noisy))
    assert variances.combined[:4].tolist() == [math.inf] * 4 and torch.isfinite(variances.combined[4:]).all()
    assert best_first_order_steps(variances.combined) == 4
    assert variances.half_order[3] == torch.inf
    chain = LinearGaussianChain(num_steps=3)
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    estimator.calibrate(chain, [rollout_of(chain, 8, 4)], decay=0.0)
    assert estimator.plan(chain, True, torch.Generator()).coverage.unbiased  # step 1 has no noise


def test_a_reward_without_gradient_has_score_terms_alone() -> None:
    chain = LinearGaussianChain(num_steps=3)
    rollout = rollout_of(chain, 8, 4)
    with_gradient = measured(chain, [rollout])
    variances = measured(chain, [replace(rollout, reward_gradient=None)])
    assert variances.first_order.tolist() == [math.inf] * 3 and variances.combined.tolist() == [math.inf] * 4
    assert torch.equal(variances.half_order, with_gradient.half_order)
    with pytest.raises(ValueError, match="at least 2 samples"):
        measured(chain, [rollout.select([0])])


def test_a_gradient_that_is_zero_everywhere_is_refused_where_rewards_differ() -> None:
    """No variance at all would win against any score term, and nothing would be trained."""
    chain = LinearGaussianChain(num_steps=3)
    rollout = rollout_of(chain, 8, 4)
    assert rollout.reward_gradient is not None
    flat_gradient = replace(rollout, reward_gradient=torch.zeros_like(rollout.reward_gradient))
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    with pytest.raises(CoverageError, match="gradient is not zero on all 8 samples"):
        estimator.calibrate(chain, [flat_gradient], decay=0.0)
    estimator.calibrate(chain, [replace(flat_gradient, rewards=torch.ones(8), advantages=torch.zeros(8))], decay=0.0)


def test_first_order_only_costs_no_score_passes() -> None:
    chain = LinearGaussianChain(num_steps=3)
    rollout = rollout_of(chain, 8, 4)
    sketch = GradientSketch(chain.parameters)
    both = measure_step_gradients(chain, [rollout], sketch)
    alone = measure_step_gradients(chain, [rollout], sketch, first_order_only=True)
    assert both.pathwise is not None and alone.pathwise is not None
    assert torch.equal(alone.pathwise, both.pathwise)
    assert not alone.scores.any() and both.scores[1:].any() and not both.scores[0].any()
    assert chain.denoiser_evaluations == 2 * 8 * 3, "every step is replayed once"


def test_running_variances_blend_and_survive_a_round_trip(tmp_path) -> None:
    inf = math.inf
    old = StepVariances(torch.tensor([1.0, 2.0]), torch.tensor([inf, 4.0]), torch.tensor([inf, 4.0, 8.0]))
    new = StepVariances(torch.tensor([3.0, 4.0]), torch.tensor([inf, 8.0]), torch.tensor([inf, 8.0, 4.0]))
    blended = old.blend(new, decay=0.25)
    assert blended.first_order.tolist() == [2.5, 3.5]
    assert blended.half_order.tolist() == [inf, 7.0]
    assert blended.combined.tolist() == [inf, 7.0, 5.0]
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    estimator.step_variances = blended
    torch.save(estimator.state_dict(), tmp_path / "state.pt")
    restored = RLREstimator(RLRSettings("auto", SINGLE))
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.step_variances is not None
    for name in ("first_order", "half_order", "combined"):
        assert torch.equal(getattr(restored.step_variances, name), getattr(blended, name))
    assert restored.plan(LinearGaussianChain(num_steps=2), True, torch.Generator()).first_order_steps == 2
