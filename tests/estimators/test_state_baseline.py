"""The state baseline's regression on hand-made observations; its unbiasedness is in test_unbiasedness.py."""

import json
from dataclasses import replace

import pytest
import torch

from rlr_peft.estimators import BaselineObservation, StateBaseline
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import rollout_of


def test_kappa_is_the_regression_coefficient_of_all_observations_of_an_update() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = 3 + torch.randn(64, generator=generator, dtype=torch.float64)
    advantages = 2 * (predictions - predictions.mean()) + torch.randn(64, generator=generator, dtype=torch.float64)
    advantages -= advantages.mean()
    whole, parts = StateBaseline(), StateBaseline()
    assert whole.kappa(5) == 0
    whole.learn([BaselineObservation(5, advantages.tolist(), predictions.tolist())])
    parts.learn(
        [
            BaselineObservation(5, advantages[:20].tolist(), predictions[:20].tolist()),
            BaselineObservation(4, [1.0, -1.0], [1.0, -1.0]),
            BaselineObservation(5, advantages[20:].tolist(), predictions[20:].tolist()),
        ]
    )
    covariance = torch.stack([advantages, predictions]).cov()
    assert whole.kappa(5) == pytest.approx(float(covariance[0, 1] / covariance[1, 1]))
    assert parts.kappa(5) == pytest.approx(whole.kappa(5))
    assert parts.kappa(4) == pytest.approx(1) and parts.kappa(3) == 0


def test_moments_run_over_updates() -> None:
    baseline = StateBaseline()
    baseline.learn([BaselineObservation(2, [1.0, -1.0], [1.0, -1.0])])  # covariance 1, variance 1
    baseline.learn([BaselineObservation(2, [-2.0, 2.0], [4.0, 0.0])])  # mean 2, mean square 8, product -4
    mean, square, product = 0.1 * 2, 0.9 * 1 + 0.1 * 8, 0.9 * 1 + 0.1 * -4
    assert baseline.kappa(2) == pytest.approx(product / (square - mean**2))


def test_predictions_that_are_all_the_same_correct_nothing() -> None:
    """Their variance is rounding, by which the products of advantages that hardly add up to 0 must not be divided."""
    for i in range(1, 100):
        baseline = StateBaseline()
        baseline.learn([BaselineObservation(2, [0.1, -0.1, 1e-9], [i / 7] * 3)])
        baseline.learn([BaselineObservation(2, [0.2, -0.1, -0.1], [i / 7] * 3)])
        assert baseline.kappa(2) == 0


def test_the_correction_takes_off_what_past_updates_predict() -> None:
    chain = LinearGaussianChain(num_steps=4)
    objective, (rollout, advantages) = QuadraticReward(chain), rollout_of(chain, 8, 4)
    baseline = StateBaseline()
    first, observation = baseline.correct(objective, rollout, advantages, 3)
    assert torch.equal(first, advantages), "nothing is known yet"
    predicted = objective.score(rollout.trajectory.pred_original_samples[2], rollout.trajectory.prompts)
    expected = predicted - (rollout.rewards.reshape(2, 4).sum(1, keepdim=True) - rollout.rewards.reshape(2, 4)).div(
        3
    ).reshape(-1)
    assert observation.t == 3 and observation.advantages == advantages.tolist()
    assert observation.predictions == pytest.approx(expected.tolist())
    baseline.learn([observation])
    fresh, of_fresh = rollout_of(chain, 8, 4, seed=50)
    corrected, later = baseline.correct(objective, fresh, of_fresh, 3)
    mean = sum(observation.predictions) / 8
    torch.testing.assert_close(
        corrected, of_fresh - baseline.kappa(3) * (torch.tensor(later.predictions).double() - mean)
    )
    assert 0 < float(corrected.var()) < 0.5 * float(of_fresh.var())


def test_the_correction_of_a_sample_never_contains_its_own_reward() -> None:
    """Only then is it free of the step's noise: the sample's reward comes into its advantage once, and not again."""
    chain = LinearGaussianChain(num_steps=4)
    objective, (rollout, advantages) = QuadraticReward(chain), rollout_of(chain, 4, 4)
    baseline = StateBaseline()
    baseline.learn([BaselineObservation(3, [1.0, -1.0], [1.0, -1.0])])
    rewards = rollout.rewards.clone()
    rewards[0] += 5
    raised = advantages.clone()
    raised[0] += 5
    raised[1:] -= 5 / 3
    before, _ = baseline.correct(objective, rollout, advantages, 3)
    after, _ = baseline.correct(objective, replace(rollout, rewards=rewards), raised, 3)
    assert float(after[0] - before[0]) == pytest.approx(5)


def test_the_state_survives_a_round_trip() -> None:
    baseline, restored = StateBaseline(), StateBaseline()
    baseline.learn([BaselineObservation(2, [1.0, -1.0], [2.0, 1.0])])
    restored.load_state_dict(baseline.state_dict())
    assert json.dumps(restored.state_dict()) == json.dumps(baseline.state_dict())
    for each in (baseline, restored):
        each.learn([BaselineObservation(2, [3.0, -3.0], [2.0, 0.5])])
    assert restored.kappa(2) == baseline.kappa(2) != 0
