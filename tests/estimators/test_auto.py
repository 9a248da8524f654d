"""Choosing among the members of the family: promises against brute force, and choices where the best is known."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from rlr_peft.config import METHODS
from rlr_peft.estimators import (
    AutoEstimator,
    GradientMoments,
    RowWeights,
    RunShape,
    build_estimator,
    promise,
)
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import gradient_of, rollout_of


def test_a_promise_is_what_simulated_batches_keep() -> None:
    """Cosine and improvement against many simulated batches, for draws of samples' own and shared ones."""
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
        (RowWeights.fixed(torch.tensor([1.0, 0, 0], dtype=torch.float64)), False),
        (
            RowWeights.drawn(choices),
            True,
        ),
    ):
        estimates = []
        for _ in range(4000):
            own = choices[torch.randint(3, (1,), generator=generator)][0] if shared else weights.mean
            estimates.append((own[:, None, None] * draw(samples)).sum(0).mean(0))
        simulated = torch.stack(estimates)
        mean = simulated.mean(0)
        promised = promise(moments, weights, full, samples, fixed_cost=7.0)
        assert promised.cosine == pytest.approx(float(mean @ truth / (mean.norm() * truth.norm())), abs=0.02)
        improvement = mean @ truth / (truth @ truth * simulated.square().sum(1).mean()).sqrt()
        cost = samples * (7 + 3 * weights.replays)
        assert promised.improvement == pytest.approx(float(improvement / cost), rel=0.05)


def test_without_signal_members_are_judged_by_what_they_share_with_the_samples_gradients() -> None:
    """Rows of pure noise: of the whole gradient v_1 + v_2 the member v_1 has half the square, v_3 nothing."""
    rows = torch.randn(3, 16, 4000, generator=torch.Generator().manual_seed(0))
    moments = GradientMoments.of(rows)
    full, first, third = (torch.tensor(weights, dtype=torch.float64) for weights in ([1, 1, 0], [1, 0, 0], [0, 0, 1]))
    of_the_samples = moments.of_the_samples(16)
    mean = rows.double().mean(1)
    torch.testing.assert_close(of_the_samples.means, mean @ mean.T)
    cosines = [promise(of_the_samples, RowWeights.fixed(w), full, 4, 7.0).cosine for w in (full, first, third)]
    assert cosines == pytest.approx([1, 0.5**0.5, 0], abs=0.05)


def auto(samples: int = 16, measures_batch: bool = False, **knobs: object) -> AutoEstimator:
    built = build_estimator(METHODS["auto"](**knobs), RunShape(6, samples=samples, measures_batch=measures_batch))
    assert isinstance(built, AutoEstimator)
    return built


def calibrated(chain: LinearGaussianChain, **knobs: object) -> AutoEstimator:
    estimator = auto(**knobs)
    assert estimator.wants_calibration(True) and not estimator.is_calibrated
    rollout, advantages = rollout_of(chain, 32, 4)
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    return estimator


def test_truncation_is_taken_where_the_last_step_says_it_all() -> None:
    """Steps that hardly pass on what they get leave the gradient to step 1."""
    chain = LinearGaussianChain(num_steps=6, decay=(0.05, 0.05), gain=(1.0, 0.05))
    truncated = calibrated(chain)
    words = truncated.describe(True)
    assert words.startswith("by measurement, ") and "full gradient of the measured samples is 0.9" in words
    assert "through the last step" in words and "times as much as rlr for the same cost" in words
    assert not truncated.coverage(chain, True).unbiased


def test_truncation_is_left_where_it_leads_astray() -> None:
    """The last step's output counts the other way round."""
    chain = LinearGaussianChain(num_steps=6, decay=(1.2, 1.2), gain=(-0.8, 0.8))
    assert "through the last step" not in calibrated(chain).describe(True)


def test_the_choice_is_restored_and_its_segments_are_the_members() -> None:
    chain = LinearGaussianChain(num_steps=6, decay=(0.05, 0.05), gain=(1.0, 0.05))
    rollout, advantages = rollout_of(chain, 32, 4)
    estimator, restored = auto(fo_roulette=False), auto(fo_roulette=False)
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    restored.load_state_dict(estimator.state_dict())
    assert restored.describe(True) == estimator.describe(True)
    truncated = build_estimator(METHODS["truncated-bp"](), RunShape(6))
    for one in (restored, truncated):
        one.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0))
    both = gradient_of(chain)
    truncated.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0))
    torch.testing.assert_close(both, 2 * gradient_of(chain))


def test_a_reward_without_gradient_is_left_to_ram() -> None:
    chain = LinearGaussianChain(num_steps=6)
    reward, (rollout, advantages) = QuadraticReward(chain, differentiable=False), rollout_of(chain, 32, 4)
    rollout = replace(rollout, reward_gradient=None)
    estimator, ram = auto(), build_estimator(METHODS["ram"](), RunShape(6))
    assert not estimator.wants_calibration(False) and estimator.for_reward(True) is estimator
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    assert not estimator.is_calibrated, "there is nothing to measure"
    assert estimator.describe(False) == f"as the reward has no gradient, ram: {ram.describe()}"
    assert "the first update measures which method" in estimator.describe(True)
    assert estimator.coverage(chain, False).describe() == ram.coverage(chain, False).describe()
    gradients = []
    for one in (estimator.for_reward(False), ram):
        one.accumulate(chain, reward, rollout, advantages, torch.Generator().manual_seed(0))
        gradients.append(gradient_of(chain))
    assert torch.equal(*gradients) and gradients[0].any()
    book = estimator.for_reward(False).accumulate(chain, reward, rollout, advantages, torch.Generator().manual_seed(0))
    estimator.learn([book])
    restored = auto()
    restored.load_state_dict(estimator.state_dict())
    assert restored.for_reward(False).state_dict()["updates"] == 1
    assert all(map(torch.equal, restored.for_reward(False).state_dict()["old"], chain.parameters))


def test_a_member_is_described_where_rlr_promises_nothing() -> None:
    """As where the samples' gradients point, on average, against each other."""
    estimator = calibrated(LinearGaussianChain(num_steps=6, decay=(0.05, 0.05), gain=(1.0, 0.05)), fo_roulette=False)
    state = estimator.state_dict()
    state["promises"]["rlr"] |= {"cosine": -0.1, "improvement": 0.0}
    estimator.load_state_dict(state)
    assert "rlr would not improve the reward on them" in estimator.describe(True)


def means_of_gradients(signal: float, seed: int = 0) -> Callable[[int], torch.nn.Parameter]:
    """Makes a parameter with the mean of B samples' gradients, of expectation |g| = signal and unit noise per entry."""
    generator, size = torch.Generator().manual_seed(seed), 5000
    direction = torch.randn(size, generator=generator)
    direction *= signal / direction.norm()

    def draw(samples: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(size))
        parameter.grad = direction + torch.randn(size, generator=generator) / samples**0.5
        return parameter

    return draw


def test_the_batch_grows_to_a_quarter_of_the_noise_scale_and_shrinks_with_it() -> None:
    """Unit noise in 5,000 entries: N = 5000 / |g|^2."""
    estimator = auto(samples=2, measures_batch=True, calibration_samples=64)
    draw = means_of_gradients(signal=math.sqrt(5000 / 80))
    seen = []
    for _ in range(60):
        samples = 2 * estimator.micro_batches
        estimator.see_gradient([draw(samples)], samples)
        seen.append(2 * estimator.micro_batches)
    assert seen[:8] == [2] * 8, "eight pairs of neighbours, nine updates, come before an answer"
    assert all(later <= 2 * earlier for earlier, later in pairwise(seen))
    assert seen[-1] == pytest.approx(80 / 4, rel=0.25)
    assert estimator.rlr.samples == seen[-1], "its roulette goes by it"
    draw = means_of_gradients(signal=math.sqrt(5000 / 20))
    for _ in range(60):
        samples = 2 * estimator.micro_batches
        estimator.see_gradient([draw(samples)], samples)
    assert 2 * estimator.micro_batches == pytest.approx(20 / 4, abs=2)


def test_the_batch_grows_to_its_limit_without_signal_and_is_restored() -> None:
    estimator, restored = (auto(samples=2, measures_batch=True) for _ in range(2))
    draw = means_of_gradients(signal=0.0)
    for _ in range(60):
        samples = 2 * estimator.micro_batches
        estimator.see_gradient([draw(samples)], samples)
    assert 2 * estimator.micro_batches == 16, "of the calibration's samples"
    restored.load_state_dict(estimator.state_dict())
    assert restored.micro_batches == estimator.micro_batches
    again = means_of_gradients(signal=0.0, seed=1)(16)
    for one in (estimator, restored):
        one.see_gradient([again], 16)
    assert restored.state_dict()["noise_scale"]["signal"] == estimator.state_dict()["noise_scale"]["signal"]


def test_a_given_batch_is_kept() -> None:
    estimator = auto(samples=2)
    draw = means_of_gradients(signal=0.0)
    for _ in range(20):
        estimator.see_gradient([draw(2)], 2)
    assert estimator.micro_batches == 1
