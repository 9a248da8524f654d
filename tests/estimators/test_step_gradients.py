"""Measured variances against the estimates that they speak of, and the K that follows from them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from benchmarks.guided_mixture import WaveReward
from rlr_peft.estimators import (
    CoverageError,
    GradientSketch,
    HalfOrder,
    Objective,
    RLREstimator,
    RLRSettings,
    Rollout,
    StepGains,
    StepGradients,
    StepVariances,
    best_first_order_steps,
    measure_step_gradients,
    step_variances,
    variance_and_error,
)
from rlr_peft.lora import attach_lora
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import flat, gradient_of, rollout_of
from tests.pipelines import chain_over, tiny_stable_diffusion

SINGLE = HalfOrder(1, "all")


def measured(chain: LinearGaussianChain, rollouts: Sequence[Rollout], advantages: torch.Tensor) -> StepVariances:
    return step_variances(measure_step_gradients(chain, rollouts, advantages, GradientSketch(chain.parameters)))


def estimates(
    chain: LinearGaussianChain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, k: int
) -> torch.Tensor:
    """The estimate of every single sample with K = k and score terms beyond, (N, number of parameters)."""
    estimator = RLREstimator(RLRSettings(k, SINGLE))
    gradients = []
    for i in range(len(rollout.rewards)):
        estimator.accumulate(chain, objective, rollout.select([i]), advantages[[i]], torch.Generator())
        gradients.append(gradient_of(chain))
    return torch.stack(gradients)


def test_step_variances_are_those_of_single_sample_gradients() -> None:
    chain = LinearGaussianChain(num_steps=4)
    objective = QuadraticReward(chain)
    rollout, advantages = rollout_of(chain, 12, 4)
    variances = measured(chain, [rollout.select(list(range(8))), rollout.select(list(range(8, 12)))], advantages)
    assert variances.has_noise.tolist() == [False, True, True, True]  # sigma_1 = 0
    pathwise = [estimates(chain, objective, rollout, torch.zeros(12), k) for k in range(1, 5)]
    for t in range(1, 5):
        through_t = pathwise[t - 1] - (pathwise[t - 2] if t > 1 else 0)  # FO_K covers steps 1..K
        assert float(variances.first_order[t - 1]) == pytest.approx(float(through_t.var(0).sum()), rel=1e-5)
    for t in range(2, 5):
        score = []
        for i in range(12):
            sample = rollout.select([i])
            value = (chain.replay(sample.trajectory, t).mean * sample.score_cotangent(t, advantages[[i]])).sum()
            score.append(flat(torch.autograd.grad(value, chain.parameters)))
        assert float(variances.half_order[t - 1]) == pytest.approx(float(torch.stack(score).var(0).sum()), rel=1e-5)


def test_a_contracting_chain_is_backpropagated_as_a_whole() -> None:
    chain = LinearGaussianChain(decay=(0.5, 0.3))
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    rollout, advantages = rollout_of(chain, 64, 4)
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    assert estimator.layout(chain, True).first_order_steps == 6


def test_the_early_steps_of_a_chaotic_chain_are_left_to_score_terms() -> None:
    """The chain amplifies at its noisy end and contracts at its clean end: K stops between, and rightly so."""
    chain = LinearGaussianChain(decay=(0.5, 2.0), gain=(0.01, 10.0))
    objective = WaveReward(chain)
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    rollout, advantages = rollout_of(chain, 64, 4, objective=objective)
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    best = estimator.layout(chain, True).first_order_steps
    assert 1 < best < 6
    fresh = rollout_of(chain, 64, 4, seed=1000, objective=objective)
    variance = {k: float(estimates(chain, objective, *fresh, k).var(0).sum()) for k in (1, best, 6)}
    assert variance[best] < 0.2 * variance[1] and variance[best] < 0.8 * variance[6]


def test_the_error_of_a_variance_shows_a_heavy_tail() -> None:
    """One sample that makes up the variance: its standard error is as large as the variance itself."""
    heavy = torch.zeros(16, 4)
    heavy[0, 0] = 8.0
    variance, error = variance_and_error(heavy)
    assert float(variance) == pytest.approx(64 / 16)  # v^2 (1 - 1/N) N / (N - 1) / N
    assert float(error / variance) == pytest.approx(1, abs=0.15)
    light = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    variance, error = variance_and_error(light)
    assert float(error) == pytest.approx(float((2 * 4 / 1000) ** 0.5), rel=0.15)  # of a chi-square with 4 degrees


def test_no_k_leaves_a_noiseless_step_to_score_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 1e-3 * torch.randn(6, 16, 4, generator=generator)
    pathwise = torch.randn(6, 16, 4, generator=generator)
    pathwise[4:] *= 10
    noisy = torch.tensor([True, True, True, False, True, True])
    variances = step_variances(StepGradients(pathwise, scores, torch.ones(16), noisy))
    assert best_first_order_steps(variances) == 4
    chain = LinearGaussianChain(num_steps=3)
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    rollout, advantages = rollout_of(chain, 8, 4)
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    assert estimator.layout(chain, True).coverage.unbiased  # step 1 has no noise


def test_a_reward_without_gradient_has_score_terms_alone() -> None:
    chain = LinearGaussianChain(num_steps=3)
    rollout, advantages = rollout_of(chain, 8, 4)
    with_gradient = measured(chain, [rollout], advantages)
    variances = measured(chain, [replace(rollout, reward_gradient=None)], advantages)
    assert variances.first_order is None
    assert torch.equal(variances.half_order, with_gradient.half_order)
    with pytest.raises(ValueError, match="at least 2 samples"):
        measured(chain, [rollout.select([0])], advantages[:1])


def test_a_gradient_that_is_zero_everywhere_is_refused_where_rewards_differ() -> None:
    """No variance at all would win against any score term, and nothing would be trained."""
    chain = LinearGaussianChain(num_steps=3)
    rollout, advantages = rollout_of(chain, 8, 4)
    assert rollout.reward_gradient is not None
    flat_gradient = replace(rollout, reward_gradient=torch.zeros_like(rollout.reward_gradient))
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    with pytest.raises(CoverageError, match="gradient is not zero on all 8 samples"):
        estimator.calibrate(chain, [flat_gradient], advantages, decay=0.0)
    estimator.calibrate(chain, [replace(flat_gradient, rewards=torch.ones(8))], torch.zeros(8), decay=0.0)


def test_first_order_only_costs_no_score_passes() -> None:
    chain = LinearGaussianChain(num_steps=3)
    rollout, advantages = rollout_of(chain, 8, 4)
    sketch = GradientSketch(chain.parameters)
    both = measure_step_gradients(chain, [rollout], advantages, sketch)
    alone = measure_step_gradients(chain, [rollout], advantages, sketch, first_order_only=True)
    assert both.pathwise is not None and alone.pathwise is not None
    assert torch.equal(alone.pathwise, both.pathwise)
    assert not alone.scores.any() and both.scores[1:].any() and not both.scores[0].any()
    assert chain.denoiser_evaluations == 2 * 8 * 3, "every step is replayed once"


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["conv1", "conv_shortcut", "conv", "to_k"]])
def test_samples_measured_together_are_those_measured_one_by_one(
    monkeypatch: pytest.MonkeyPatch, targets: list[str]
) -> None:
    """Of LoRA layers, linear and convolutions with strides too, under guidance and gradient checkpointing."""
    pipeline = tiny_stable_diffusion(dtype=torch.float64)
    pipeline.unet.requires_grad_(False)
    parameters = attach_lora(pipeline.unet, target_modules=targets, rank=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    pipeline.unet.enable_gradient_checkpointing()
    chain = chain_over(pipeline, num_inference_steps=3, guidance_scale=4.0)
    trajectory = chain.sample(["a red ball", "sky", "a cat"], [0, 1, 2])
    gradient = torch.randn(trajectory.latents[0].shape, generator=generator, dtype=torch.float64)
    rollout, advantages = Rollout(trajectory, torch.zeros(3), gradient), torch.arange(3.0)
    sketch = GradientSketch(chain.parameters)
    together = measure_step_gradients(chain, [rollout], advantages, sketch, with_held=True)
    monkeypatch.setattr("rlr_peft.estimators.step_gradients.MOST_NUMBERS", 2 * sum(p.numel() for p in parameters))
    in_two_parts = measure_step_gradients(chain, [rollout], advantages, sketch, with_held=True)
    before = [parameter.clone() for parameter in parameters]
    pipeline.unet.train()  # as with dropout, where a sample's masks depend on its batch
    assert chain.separate_samples(3) is None
    one_by_one = measure_step_gradients(chain, [rollout], advantages, sketch, with_held=True)
    for name in ("pathwise", "held", "scores", "cotangent_squares"):
        expected = getattr(one_by_one, name)
        smallest = 1e-6 * float(expected.abs().max())
        for found in (together, in_two_parts):
            torch.testing.assert_close(getattr(found, name), expected, rtol=1e-4, atol=smallest)
    assert together.pathwise is not None and together.pathwise.abs().sum((0, 2)).min() > 0
    assert all(map(torch.equal, before, parameters)) and all(parameter.grad is None for parameter in parameters)


def test_running_gains_blend_and_survive_a_round_trip(tmp_path) -> None:
    noise = torch.tensor([False, True])
    old = StepGains(torch.tensor([0.0, 4.0]), noise, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    new = StepGains(torch.tensor([0.0, 8.0]), noise, torch.tensor([3.0, 4.0]), torch.tensor([2.0, 6.0]))
    blended = old.blend(new, decay=0.25)
    assert blended.first_order is not None and blended.first_order.tolist() == [2.5, 3.5]
    assert blended.cotangents is not None and blended.cotangents.tolist() == [1.75, 4.75]
    assert blended.scores.tolist() == [0.0, 7.0]
    chain = LinearGaussianChain(num_steps=4)
    estimator = RLREstimator(RLRSettings("auto", SINGLE))
    for seed in range(2):
        rollout, advantages = rollout_of(chain, 16, 4, seed)
        estimator.calibrate(chain, [rollout], advantages, decay=0.5)
    torch.save(estimator.state_dict(), tmp_path / "state.pt")
    restored = RLREstimator(RLRSettings("auto", SINGLE))
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.statistics.variances is not None and estimator.statistics.variances is not None
    for name in ("first_order", "half_order", "has_noise"):
        assert torch.equal(getattr(restored.statistics.variances, name), getattr(estimator.statistics.variances, name))
    assert restored.layout(chain, True).first_order_steps == 4
