"""What is computed from sketches against really running the estimators."""

from dataclasses import replace

import pytest
import torch

from rlr_peft.diagnose import (
    DiagnosisError,
    Evidence,
    SampleEstimates,
    black_box_tail,
    cosine_to_reference,
    drawn_score_terms,
    evenly_spread,
    first_and_half_order,
    first_half,
    gather_evidence,
    methods_to_compare,
    mixed_orders,
    noise_scale,
    pathwise_tail,
    sample_estimates,
    score_terms,
)
from rlr_peft.estimators import (
    CoverageError,
    GradientSketch,
    HalfOrder,
    RLREstimator,
    RLRSettings,
    StepGradients,
    leave_one_out,
    variance_and_error,
)
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.diagnose.diagnoses import GROUP, SAMPLES, config_with, evidence_of, rollout_of, sketch_of


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return evidence_of(SAMPLES)


@pytest.fixture(scope="module")
def blind_evidence() -> Evidence:
    return evidence_of(SAMPLES, differentiable=False)


def run_many(
    settings: RLRSettings, differentiable: bool = True, calls: int = 1, replicates: int = 12000
) -> torch.Tensor:
    """Estimates of independent single samples by really running the estimator, (calls * replicates, 12).

    Every replicate of the parameters gets one sample; the weights 1 / q are drawn once per call.
    """
    chain = LinearGaussianChain(num_steps=6, replicates=replicates, last_std=0.2)
    objective, estimator = QuadraticReward(chain), RLREstimator(settings)
    generator, rows = torch.Generator().manual_seed(1), []
    for call in range(calls):
        rollout = rollout_of(chain, objective, replicates, 10_000 + call * replicates, differentiable)
        estimator.accumulate(chain, objective, rollout, leave_one_out(rollout.rewards, GROUP), generator)
        rows.append(torch.cat([p.grad.reshape(replicates, -1) for p in chain.parameters], dim=1))
        for parameter in chain.parameters:
            parameter.grad = None
    return torch.cat(rows)


def first_samples(gradients: StepGradients, count: int) -> StepGradients:
    assert gradients.pathwise is not None
    return replace(
        gradients,
        pathwise=gradients.pathwise[:, :count],
        scores=gradients.scores[:, :count],
        advantages=gradients.advantages[:count],
    )


def assert_same_variance(estimates: SampleEstimates, ran: torch.Tensor) -> None:
    """Within four standard errors of the two measurements together."""
    variance, error = variance_and_error(ran)
    allowed = 4 * (estimates.variance_error**2 + float(error) ** 2) ** 0.5
    assert abs(estimates.variance - float(variance)) < allowed
    assert allowed < 0.6 * float(variance), "the comparison must be able to fail"


def test_the_sketch_of_these_tests_is_exact() -> None:
    chain = LinearGaussianChain()
    ones = sketch_of(chain)([torch.ones_like(p) for p in chain.parameters])
    assert int((ones.abs() == 1).sum()) == 12


def test_squared_deviations_average_to_the_variance_of_the_estimators(evidence: Evidence) -> None:
    estimates = sample_estimates(evidence.gradients.half_order[2])
    variance, error = variance_and_error(evidence.gradients.half_order[2])
    assert estimates.variance == pytest.approx(float(variance))
    assert estimates.variance_error == pytest.approx(float(error))


@pytest.mark.parametrize("steps", [0, 2, 6])
def test_variance_from_sketches_is_that_of_running_the_estimator(evidence: Evidence, steps: int) -> None:
    ran = run_many(RLRSettings(steps, HalfOrder(1, "all")))
    assert_same_variance(sample_estimates(first_and_half_order(evidence.gradients, steps)), ran)


def test_mixed_orders_from_sketches_are_what_the_estimator_gives(evidence: Evidence) -> None:
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    rollout = rollout_of(chain, QuadraticReward(chain), SAMPLES)
    advantages = leave_one_out(rollout.rewards, GROUP)
    estimator = RLREstimator(RLRSettings("auto", HalfOrder(1, "all"), step_choice="inverse-variance"))
    estimator.statistics.variances = evidence.variances
    mixture = estimator.layout(chain, True).mixture
    assert mixture is not None
    weights = torch.zeros(6)
    weights[: len(mixture)] = mixture
    sketch = sketch_of(chain)
    for i in (0, 7):
        estimator.accumulate(chain, QuadraticReward(chain), rollout.select([i]), advantages[[i]], torch.Generator())
        ran = sketch([p.grad for p in chain.parameters]).float()
        torch.testing.assert_close(mixed_orders(evidence.gradients, weights)[i], ran, rtol=1e-4, atol=1e-4)
        for parameter in chain.parameters:
            parameter.grad = None


def test_variance_of_drawn_steps_is_exact_over_all_draws(evidence: Evidence) -> None:
    """Against many simulated draws for every sample, and against really running the estimator."""
    few = first_samples(evidence.gradients, 40)
    generator = torch.Generator().manual_seed(1)
    simulated = torch.stack([drawn_score_terms(few, 1, 2, generator).vectors for _ in range(200)])
    variance = float((simulated - first_and_half_order(few, 1).mean(0)).square().sum(2).mean()) * 40 / 39
    assert drawn_score_terms(few, 1, 2, generator).variance == pytest.approx(variance, rel=0.05)
    drawn = drawn_score_terms(evidence.gradients, 1, 2, generator)
    assert drawn.variance > 1.3 * sample_estimates(first_and_half_order(evidence.gradients, 1)).variance
    assert_same_variance(drawn, run_many(RLRSettings(1, HalfOrder(1, 2)), calls=60, replicates=400))


def test_black_box_tail_from_sketches_is_that_of_running_the_estimator(blind_evidence: Evidence) -> None:
    estimates = sample_estimates(black_box_tail(blind_evidence.gradients, blind_evidence.mirrored[:3]))
    ran = run_many(RLRSettings(0, HalfOrder(1, "all"), black_box_steps=3), differentiable=False)
    assert_same_variance(estimates, ran)
    plain = sample_estimates(score_terms(blind_evidence.gradients, blind_evidence.gradients.advantages))
    assert estimates.variance < plain.variance


def test_noise_scale_is_that_of_the_exact_gradient(evidence: Evidence) -> None:
    exact = torch.cat([g.flatten() for g in LinearGaussianChain(num_steps=6, last_std=0.2).exact_gradient()])
    full = sample_estimates(pathwise_tail(evidence.gradients, 6))
    assert noise_scale(full) == pytest.approx(full.variance / float(exact.square().sum()), rel=0.15)


def test_pure_noise_has_no_signal_and_constant_estimates_no_noise() -> None:
    noise = torch.randn(200, 50, 8, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([noise_scale(sample_estimates(vectors)) for vectors in noise])
    assert scales.isinf().double().mean() > 0.3
    assert (1 / scales).mean() < 0.01  # without taking off the bias it would be 1 / 50
    assert noise_scale(sample_estimates(torch.ones(4, 3))) == 0


def test_cosine_of_an_unbiased_method_is_near_one_with_many_samples(evidence: Evidence) -> None:
    is_first = first_half(SAMPLES, GROUP)
    full = sample_estimates(pathwise_tail(evidence.gradients, 6))
    to_itself = cosine_to_reference(full, full, is_first)
    assert to_itself.value > 0.97
    assert to_itself.low <= to_itself.value <= to_itself.high
    assert to_itself.high - to_itself.low < 0.06
    truncated = sample_estimates(pathwise_tail(evidence.gradients, 1))
    assert cosine_to_reference(truncated, full, is_first).high < to_itself.low


def test_cosine_of_reinforce_is_uncertain_with_few_samples(evidence: Evidence) -> None:
    few = evidence_of(8, seed=3)
    full, reinforce = (
        sample_estimates(vectors)
        for vectors in (pathwise_tail(few.gradients, 6), score_terms(few.gradients, few.gradients.advantages))
    )
    uncertain = cosine_to_reference(reinforce, full, first_half(8, GROUP))
    assert uncertain.high - uncertain.low > 0.4
    many = cosine_to_reference(
        sample_estimates(score_terms(evidence.gradients, evidence.gradients.advantages)),
        sample_estimates(pathwise_tail(evidence.gradients, 6)),
        first_half(SAMPLES, GROUP),
    )
    assert many.high - many.low < 0.5 * (uncertain.high - uncertain.low)


def test_the_interval_covers_the_mean_cosine_about_as_often_as_it_says() -> None:
    """Of 150 repeated measurements, at least 88 % of the 95 % intervals hold the mean cosine of all of them."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.one_hot(torch.tensor(0), 20).float()
    found = []
    for _ in range(150):
        vectors = direction + torch.randn(32, 20, generator=generator)
        estimates = sample_estimates(vectors)
        found.append(cosine_to_reference(estimates, estimates, first_half(32, 2)))
    center = sum(cosine.value for cosine in found) / len(found)
    assert sum(cosine.low <= center <= cosine.high for cosine in found) >= 0.88 * len(found)


def test_halves_keep_groups_whole_and_subsets_spread_over_both() -> None:
    assert first_half(12, 4).tolist() == [True] * 4 + [False] * 8
    assert first_half(4, 4).tolist() == [True, True, False, False]
    assert evenly_spread(16, 8) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert evenly_spread(3, 8) == [0, 1, 2]


def test_own_advantages_of_the_score_function_methods() -> None:
    evidence, config = evidence_of(32), config_with()
    methods = {
        m.name: m for m in methods_to_compare(LinearGaussianChain(num_steps=6, last_std=0.2), evidence, config).methods
    }
    scores, rewards = evidence.gradients.scores.sum(0), evidence.rewards
    batch = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(methods["ddpo"].estimates.vectors, batch.clamp(-5, 5)[:, None] * scores)
    groups = rewards.reshape(-1, GROUP)
    normalised = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(methods["grpo"].estimates.vectors, normalised.reshape(-1)[:, None] * scores)
    # d3po at the reference: half the difference of a pair's scores, times beta / 2, with the sign of the rewards'
    pairs = methods["d3po"].estimates.vectors.reshape(-1, 2, scores.shape[1]).mean(1)
    sign = torch.sign(rewards[0::2] - rewards[1::2])[:, None]
    torch.testing.assert_close(pairs, 0.1 / 2 * sign * (scores[0::2] - scores[1::2]) / 2)


def test_d3po_is_what_its_estimator_gives() -> None:
    chain, evidence = LinearGaussianChain(num_steps=6, last_std=0.2), evidence_of(32)
    rollout = rollout_of(chain, QuadraticReward(chain), 32).select([4, 5])
    method = next(m for m in methods_to_compare(chain, evidence, config_with()).methods if m.name == "d3po")
    method.estimator.accumulate(chain, QuadraticReward(chain), rollout, rollout.rewards, torch.Generator())
    ran = sketch_of(chain)([p.grad for p in chain.parameters]).float()
    torch.testing.assert_close(method.estimates.vectors[4:6].sum(0), ran, rtol=1e-4, atol=1e-4)


def test_samples_that_cannot_tell_anything_are_refused() -> None:
    chain = LinearGaussianChain(num_steps=3, last_std=0.2)
    objective, sketch = QuadraticReward(chain), GradientSketch(chain.parameters)
    rollout = rollout_of(chain, objective, 8)
    equal = replace(rollout, rewards=torch.ones(8))
    zero = replace(rollout, reward_gradient=torch.zeros_like(rollout.trajectory.latents[0]))
    for bad, message in [
        (rollout.select([0, 1]), "4 samples or more"),
        (equal, "rewards that differ"),
        (zero, "gradient is not zero"),
    ]:
        with pytest.raises((DiagnosisError, CoverageError), match=message):
            gather_evidence(chain, objective, [bad], leave_one_out(bad.rewards, 2), sketch, 2)
