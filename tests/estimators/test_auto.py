"""Choosing among the members of the family: promises against brute force, and choices where the best is known."""

from dataclasses import replace

import pytest
import torch

from rlr_peft.config.methods import METHODS
from rlr_peft.estimators import AutoEstimator, GradientMoments, Weights, build_estimator, promise
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import gradient_of, rollout_of


def test_a_promise_is_what_simulated_batches_keep() -> None:
    """Cosine, noise scale and improvement against many simulated batches, for draws of samples' own and shared ones."""
    generator = torch.Generator().manual_seed(0)
    rows, samples, dimension = 3, 4, 5
    center = torch.randn(rows, 1, dimension, generator=generator, dtype=torch.float64)

    def draw(count: int) -> torch.Tensor:
        return center + torch.randn(rows, count, dimension, generator=generator, dtype=torch.float64)

    moments = GradientMoments.of(draw(20_000))
    full = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    choices = torch.tensor([[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]], dtype=torch.float64)
    truth = center.sum(0).flatten()
    for weights, shared in (
        (Weights.fixed(torch.tensor([1.0, 0, 0], dtype=torch.float64)), False),
        (
            Weights.drawn(choices),
            True,
        ),
    ):
        estimates = []
        for _ in range(4000):
            own = choices[torch.randint(3, (1,), generator=generator)][0] if shared else weights.mean
            estimates.append((own[:, None, None] * draw(samples)).sum(0).mean(0))
        simulated = torch.stack(estimates)
        mean = simulated.mean(0)
        promised = promise(moments, weights, full, lambda noise_scale: samples, fixed_cost=7.0)
        assert promised.cosine == pytest.approx(float(mean @ truth / (mean.norm() * truth.norm())), abs=0.02)
        improvement = mean @ truth / (truth @ truth * simulated.square().sum(1).mean()).sqrt()
        cost = samples * (7 + 3 * weights.replays)
        assert promised.improvement == pytest.approx(float(improvement / cost), rel=0.05)


def auto(samples: int = 16, measures_batch: bool = False, **knobs: object) -> AutoEstimator:
    built = build_estimator(METHODS["auto"](**knobs), 6, samples=samples, measures_batch=measures_batch)
    assert isinstance(built, AutoEstimator)
    return built


def calibrated(chain: LinearGaussianChain, **knobs: object) -> AutoEstimator:
    estimator = auto(**knobs)
    assert estimator.wants_calibration(True) and not estimator.is_calibrated
    estimator.calibrate(chain, [rollout_of(chain, 32, 4)], decay=0.0)
    return estimator


def test_truncation_is_taken_where_the_last_step_says_it_all_unless_the_roulette_costs_no_more() -> None:
    """Steps that hardly pass on what they get leave the gradient to step 1."""
    chain = LinearGaussianChain(num_steps=6, decay=(0.05, 0.05), gain=(1.0, 0.05))
    truncated, roulette = calibrated(chain, fo_roulette=False), calibrated(chain, fo_roulette=True)
    words = truncated.describe(True)
    assert words.startswith("chosen by measurement: ") and "cosine with the full gradient 0.9" in words
    assert "through the last 1 step(s)" in words and "times the improvement per cost of rlr" in words
    assert not truncated.coverage(chain, True).unbiased and roulette.coverage(chain, True).unbiased


def test_truncation_is_left_where_it_leads_astray() -> None:
    """The last step's output counts the other way round."""
    chain = LinearGaussianChain(num_steps=6, decay=(1.2, 1.2), gain=(-0.8, 0.8))
    assert "through the last 1 step(s)" not in calibrated(chain).describe(True)


def test_the_choice_is_restored_and_its_segments_are_the_members() -> None:
    chain = LinearGaussianChain(num_steps=6, decay=(0.05, 0.05), gain=(1.0, 0.05))
    rollout = rollout_of(chain, 32, 4)
    estimator, restored = auto(fo_roulette=False), auto(fo_roulette=False)
    estimator.calibrate(chain, [rollout], decay=0.0)
    restored.load_state_dict(estimator.state_dict())
    assert restored.describe(True) == estimator.describe(True)
    truncated = build_estimator(METHODS["truncated-bp"](), 6)
    for one in (restored, truncated):
        one.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator().manual_seed(0))
    both = gradient_of(chain)
    truncated.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator().manual_seed(0))
    torch.testing.assert_close(both, 2 * gradient_of(chain))


def test_a_reward_without_gradient_leaves_rlr() -> None:
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    estimator = auto()
    assert not estimator.wants_calibration(False)
    assert estimator.coverage(chain, False).unbiased
    assert "until it is measured rlr" in estimator.describe(False)


def test_the_batch_is_a_quarter_of_the_noise_scale_in_whole_micro_batches() -> None:
    """Against the covariance and the mean of single samples' score terms."""
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    rollout, scores = (
        replace(rollout_of(chain, 400, 4), reward_gradient=None),
        build_estimator(METHODS["reinforce"](), 6),
    )
    gradients = []
    for i in range(400):
        scores.accumulate(chain, QuadraticReward(chain), rollout.select([i]), torch.Generator())
        gradients.append(gradient_of(chain))
    vectors = torch.stack(gradients)
    variance = vectors.var(0).sum()
    noise_scale = float(variance / (vectors.mean(0).square().sum() - variance / 400))
    estimator, restored = (auto(2, measures_batch=True) for _ in range(2))
    assert estimator.wants_calibration(False) and estimator.micro_batches == 1
    estimator.calibrate(chain, [rollout], decay=0.0)
    assert estimator.micro_batches == pytest.approx(noise_scale / 8, rel=0.15) and noise_scale > 40
    assert f"and so {2 * estimator.micro_batches} of them an update" in estimator.describe(False)
    restored.load_state_dict(estimator.state_dict())
    assert restored.micro_batches == estimator.micro_batches
    assert restored.rlr.samples == estimator.rlr.samples == 2 * estimator.micro_batches, "its roulette goes by it"


def test_the_batch_is_at_most_the_samples_that_measured_it() -> None:
    """Advantages that have nothing to do with the samples leave noise alone."""
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0))
    estimator = auto(2, measures_batch=True)
    estimator.calibrate(chain, [replace(rollout_of(chain, 8, 4), reward_gradient=None, advantages=noise)], decay=0.0)
    assert estimator.micro_batches == 4
