"""The diagnosis: its statistics against really running the estimators, its advice, its files."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from rlr_peft.byte_counters import counted_tape
from rlr_peft.config import Config, load_config
from rlr_peft.diagnose.costs import evenly_spread
from rlr_peft.diagnose.diagnosis import Diagnosis, MethodResult, diagnose, stages_of
from rlr_peft.diagnose.estimates import (
    SampleEstimates,
    black_box_tail,
    cosine_to_reference,
    drawn_score_terms,
    first_and_half_order,
    first_half,
    mixed_orders,
    pathwise_tail,
    sample_estimates,
    score_terms,
    signal_to_noise,
)
from rlr_peft.diagnose.evidence import DiagnosisError, Evidence, gather_evidence
from rlr_peft.diagnose.methods import methods_to_compare
from rlr_peft.diagnose.recommendation import recommend
from rlr_peft.diagnose.report import console_text, plain_numbers, write_report
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.base import Rollout
from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.layout import RLRSettings
from rlr_peft.estimators.objective import DecodedReward, Objective
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.sampling import sample_batch
from rlr_peft.estimators.variance import GradientSketch, StepGradients, variance_and_error
from rlr_peft.intervals import short_number, with_error
from rlr_peft.lora import adapter_disabled, attach_lora
from rlr_peft.rewards.callables import CallableReward
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.pipelines import chain_over, tiny_stable_diffusion
from tests.programs import completed

GROUP = 4
SAMPLES = 1600
REQUIRED = "--pretrained_model_name_or_path tiny-shapes --prompt_path tiny-shapes/train --reward_fn tiny-shapes".split()


class WavyReward:
    """``R = sin(2 w . x_0)``: bounded, so only the chain's amplification makes its gradient large."""

    def __init__(self, chain: LinearGaussianChain) -> None:
        self.slope = 2 * chain.reward_slope

    def score(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return (latents @ self.slope).sin()

    def score_with_gradient(self, latents: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.score(latents, prompts), (latents @ self.slope).cos()[:, None] * self.slope


def rollout_of(
    chain: LinearGaussianChain, objective: Objective, samples: int, seed: int = 0, differentiable: bool = True
) -> Rollout:
    trajectory = chain.sample([f"prompt {i // GROUP}" for i in range(samples)], list(range(seed, seed + samples)))
    rewards, gradient = objective.score_with_gradient(trajectory.latents[0], trajectory.prompts)
    return Rollout(trajectory, rewards, leave_one_out(rewards, GROUP), gradient if differentiable else None)


def chaotic_chain() -> LinearGaussianChain:
    """Its first steps, next to the noise, stretch everything, and the parameters matter most there."""
    return LinearGaussianChain(num_steps=6, last_std=0.2, decay=(0.5, 2.0), gain=(0.06, 10.0))


def sketch_of(chain: LinearGaussianChain) -> GradientSketch:
    """Small, and exact: no two of the 12 parameters share a bucket."""
    return GradientSketch(chain.parameters, dimension=1024)


def evidence_of(samples: int, differentiable: bool = True, seed: int = 0) -> Evidence:
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    objective = QuadraticReward(chain)
    rollout = rollout_of(chain, objective, samples, seed, differentiable)
    return gather_evidence(chain, objective, [rollout], sketch_of(chain), GROUP, show_progress=False)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return evidence_of(SAMPLES)


@pytest.fixture(scope="module")
def blind_evidence() -> Evidence:
    return evidence_of(SAMPLES, differentiable=False)


def config_with(*flags: str) -> Config:
    return load_config([*REQUIRED, "--num_inference_steps", "6", *flags])


def diagnosis_of(
    chain: LinearGaussianChain,
    objective: Objective,
    samples: int,
    *flags: str,
    differentiable: bool = True,
) -> Diagnosis:
    rollout = rollout_of(chain, objective, samples, differentiable=differentiable)
    config = load_config([*REQUIRED, "--num_inference_steps", str(chain.num_steps), *flags])
    return diagnose(
        chain,
        objective,
        [rollout],
        config,
        group_size=GROUP,
        sampling_seconds=0.5,
        facts={"base": "linear <chain>"},
        show_progress=False,
    )


def result_of(diagnosis: Diagnosis, name: str) -> MethodResult:
    return next(result for result in diagnosis.results if result.method.name == name)


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
        estimator.accumulate(chain, objective, rollout, generator)
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
    estimator = RLREstimator(RLRSettings("auto", HalfOrder(1, "all"), step_choice="inverse-variance"))
    estimator.statistics.variances = evidence.variances
    mixture = estimator.layout(chain, True).mixture
    assert mixture is not None
    weights = torch.zeros(6)
    weights[: len(mixture)] = mixture
    sketch = sketch_of(chain)
    for i in (0, 7):
        estimator.accumulate(chain, QuadraticReward(chain), rollout.select([i]), torch.Generator())
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


def test_signal_to_noise_is_that_of_the_exact_gradient(evidence: Evidence) -> None:
    exact = torch.cat([g.flatten() for g in LinearGaussianChain(num_steps=6, last_std=0.2).exact_gradient()])
    full = sample_estimates(pathwise_tail(evidence.gradients, 6))
    assert signal_to_noise(full) == pytest.approx(float(exact.square().sum()) / full.variance, rel=0.15)


def test_pure_noise_has_no_signal_and_constant_estimates_no_noise() -> None:
    noise = torch.randn(200, 50, 8, generator=torch.Generator().manual_seed(0))
    ratios = torch.tensor([signal_to_noise(sample_estimates(vectors)) for vectors in noise])
    assert ratios.min() == 0
    assert ratios.mean() < 0.01  # without taking off the bias it would be 1 / 50
    assert signal_to_noise(sample_estimates(torch.ones(4, 3))) == 0


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


def test_stages_are_the_thirds_of_the_chain() -> None:
    energy = torch.tensor([1.0, 1, 1, 1, 1, 1, 4, 0, 0, 0])
    stages = stages_of(10, energy)
    assert [(s.name, s.first_step, s.last_step) for s in stages] == [("coarse", 8, 10), ("mid", 4, 7), ("fine", 1, 3)]
    assert sum(s.energy_share for s in stages) == pytest.approx(1)
    assert stages[1].energy_share == pytest.approx(0.7)
    assert len(stages_of(1, None)) == 1


def test_own_advantages_of_the_score_function_methods(evidence: Evidence) -> None:
    config = config_with()
    methods = {m.name: m for m in methods_to_compare(evidence, config.estimator, 0).methods}
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


def test_d3po_is_what_its_estimator_gives(evidence: Evidence) -> None:
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    rollout = rollout_of(chain, QuadraticReward(chain), SAMPLES).select([4, 5])
    method = next(m for m in methods_to_compare(evidence, config_with().estimator, 0).methods if m.name == "d3po")
    method.estimator.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator())
    ran = sketch_of(chain)([p.grad for p in chain.parameters]).float()
    torch.testing.assert_close(method.estimates.vectors[4:6].sum(0), ran, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def calm() -> Diagnosis:
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    return diagnosis_of(chain, QuadraticReward(chain), 32)


@pytest.fixture(scope="module")
def chaotic() -> Diagnosis:
    chain = chaotic_chain()
    return diagnosis_of(chain, WavyReward(chain), 96)


@pytest.fixture(scope="module")
def blind() -> Diagnosis:
    chain = LinearGaussianChain(num_steps=6, last_std=0.0)
    return diagnosis_of(chain, QuadraticReward(chain, differentiable=False), 32, differentiable=False)


def test_costs_are_what_running_costs(calm: Diagnosis) -> None:
    expected = {
        "full-bp": (12, 6),
        "truncated-bp, K = 1": (7, 1),
        "truncated-bp, K = 2": (8, 2),
        "rlr, K = 1": (12, 6),
        "reinforce": (12, 6),
        "ddpo": (12, 6),
        "grpo": (12, 6),
        "d3po": (18, 6),
        "rlr, K = 1, blocks of h = 2": (12, 6),
        "zeroth order on all steps": (18, 0),
        "rlr-paper": (6 + 1 + 2 + 12, 3),
        "refl": (7, 1),
    }
    for name, (evaluations, backwards) in expected.items():
        cost = result_of(calm, name).cost
        assert (cost.denoiser_evaluations, cost.backward_passes) == (evaluations, backwards), name
        assert cost.work == evaluations + 2 * backwards
        assert 0.5 < cost.seconds < 5
        assert (cost.peak_bytes > 0) == (backwards > 0), name
    assert calm.cost_samples == 4
    assert {result.method.name for result in calm.results} >= set(expected)


def test_weights_and_gradients_are_left_as_they_were() -> None:
    chain = LinearGaussianChain(num_steps=3, last_std=0.2)
    before = [parameter.detach().clone() for parameter in chain.parameters]
    diagnosis_of(chain, QuadraticReward(chain), 8)
    for parameter, old in zip(chain.parameters, before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None


def test_a_pipelines_weights_are_left_as_they_were() -> None:
    """Also where the adapter is switched off for the reference model and weights are perturbed."""
    pipeline = tiny_stable_diffusion("v_prediction")
    attach_lora(pipeline.unet, target_modules=["to_q"], rank=2)
    chain = chain_over(pipeline, num_inference_steps=2, reference=adapter_disabled)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in pipeline.unet.named_parameters()}
    reward = CallableReward("redness", lambda images, prompts: images[:, 0].mean((1, 2)))
    objective = DecodedReward(chain, reward, 2)
    batch = sample_batch(chain, objective, ["a", "a", "b", "b"], [0, 1, 2, 3], 2)
    config = load_config([*REQUIRED, "--num_inference_steps", "2"])
    diagnose(
        chain,
        objective,
        batch.rollouts(leave_one_out(batch.scored.scores, 2)),
        config,
        group_size=2,
        sampling_seconds=0.0,
        facts={},
        show_progress=False,
    )
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_the_reference_is_the_least_noisy_unbiased_method(calm: Diagnosis, blind: Diagnosis) -> None:
    unbiased = [r for r in calm.results if r.coverage.unbiased and len(r.estimates.samples) == 32]
    assert calm.reference.estimates.variance == min(r.estimates.variance for r in unbiased)
    # Nothing can cover the last step of this chain, so the reference leaves out that one and nothing else.
    assert not any(r.coverage.unbiased for r in blind.results)
    assert blind.reference.coverage.weights.tolist() == [0, 1, 1, 1, 1, 1]
    assert not blind.reference.coverage.departures


def test_the_whole_chain_is_differentiated_where_pathwise_gradients_are_calm(calm: Diagnosis) -> None:
    advice = recommend(calm)
    assert advice.flags == "--estimator rlr --fo_steps 6"
    assert "full backpropagation" in advice.advice["First order"]
    assert advice.advice["Score terms"] == "No step needs a score term."
    assert result_of(calm, "rlr, K = 6 (measured)").estimates.variance < result_of(calm, "reinforce").estimates.variance


def test_chaotic_steps_get_score_terms(chaotic: Diagnosis) -> None:
    best = chaotic.compared.first_order_steps
    assert 2 <= best <= 4
    advice = recommend(chaotic)
    assert f"--fo_steps {best}" in advice.advice["First order"]
    assert f"steps {best + 1}-6" in advice.advice["Score terms"]
    chosen = result_of(chaotic, f"rlr, K = {best} (measured)")
    assert chosen.estimates.variance < 0.7 * result_of(chaotic, "full-bp").estimates.variance


def test_the_window_is_that_of_the_stage_with_most_energy(chaotic: Diagnosis) -> None:
    def advice(**shares: float) -> str:
        stages = [replace(stage, energy_share=shares[stage.name]) for stage in chaotic.profile.stages]
        changed = replace(chaotic, profile=replace(chaotic.profile, stages=stages))
        return recommend(changed).advice["One stage only"]

    best = chaotic.compared.first_order_steps
    assert f"--fo_steps {best} --ho_blocks 1 --ho_start window --ho_window 5 6" in advice(coarse=0.8, mid=0.1, fine=0.1)
    assert "gains nothing" in advice(coarse=0.1, mid=0.1, fine=0.8)


def test_mixed_orders_are_recommended_only_beyond_their_error(chaotic: Diagnosis) -> None:
    best = chaotic.compared.first_order_steps
    crossing, mixed = result_of(chaotic, f"rlr, K = {best} (measured)"), result_of(chaotic, "rlr, mixed orders")

    def with_squares(squares: torch.Tensor) -> str:
        changed = replace(mixed, estimates=replace(mixed.estimates, squares=squares), cost=crossing.cost)
        results = [changed if result is mixed else result for result in chaotic.results]
        return recommend(replace(chaotic, results=results)).flags

    squares = crossing.estimates.squares
    assert with_squares(squares * 0.5) == "--estimator rlr --step_choice inverse-variance"
    assert with_squares(squares) == f"--estimator rlr --fo_steps {best}"
    assert "fo_steps" in with_squares(0.99 * squares.roll(1))  # better on average, but within the error


def test_weak_evidence_is_called_weak(chaotic: Diagnosis) -> None:
    few = diagnosis_of(chaotic_chain(), WavyReward(chaotic_chain()), 8)
    assert "evidence for this very K is weak" in recommend(few).advice["First order"]
    assert "Cosines say little here" in recommend(few).advice["Evidence"]


def test_recommended_flags_can_be_trained_with(calm: Diagnosis, chaotic: Diagnosis, blind: Diagnosis) -> None:
    for diagnosis in (calm, chaotic, blind):
        advice = recommend(diagnosis)
        texts = [advice.flags, *re.findall(r"`(--fo_steps \d+ --ho_blocks[^`]*)`", " ".join(advice.advice.values()))]
        for flags in texts:
            load_config([*REQUIRED, "--num_inference_steps", "6", *flags.split()])


def test_a_reward_without_gradient_gets_a_black_box_tail(blind: Diagnosis) -> None:
    left_out = blind.compared.left_out
    for name in ("full-bp", "truncated-bp", "refl"):
        assert left_out[name] == "the reward has no gradient"
    assert not any("pathwise" in r.method.name or "refl" in r.method.name for r in blind.results)
    steps = blind.compared.black_box_steps
    assert steps >= 2
    advice = recommend(blind)
    assert advice.flags == f"--estimator rlr --black_box_steps {steps}"
    assert "Nothing can cover step 1, where there is no noise" in advice.advice["Score terms"]
    chosen = result_of(blind, f"rlr, black-box tail of {steps} (measured)")
    assert chosen.cost.denoiser_evaluations == 6 + 5 + sum(t - 1 for t in range(2, steps + 1))
    numbers = plain_numbers(blind, advice)
    assert numbers["profile"]["energy"] is None and numbers["first_order_steps"] is None


def test_a_chain_without_noise_has_no_score_terms() -> None:
    chain = LinearGaussianChain(num_steps=3)
    chain._stds = [0.0] * 3
    diagnosis = diagnosis_of(chain, QuadraticReward(chain), 8)
    assert diagnosis.compared.first_order_steps == 3
    assert "no noise" in diagnosis.compared.left_out["reinforce"]
    assert recommend(diagnosis).advice["Score terms"] == "No step needs a score term."
    assert {r.method.name for r in diagnosis.results} >= {"full-bp", "zeroth order on all steps", "refl"}


def test_budgets_and_special_steps_are_commented_on(chaotic: Diagnosis) -> None:
    best = chaotic.compared.first_order_steps
    flags = ["--estimator", "rlr-paper", "--ho_length", "auto", "--nfe_budget", str(6 + best + 12 + 2)]
    flags += ["--memory_budget", "1", "--ho_step_memory", "0.1", "--zo_step_memory", "0.01"]
    with_budget = recommend(replace(chaotic, config=config_with(*flags))).advice["Budgets"]
    assert f"`--ho_length 2` (`--fo_steps {best} --ho_blocks 1`)" in with_budget
    assert "--ho_step_memory" in with_budget and "times the variance that it has with the single steps" in with_budget
    flags[5] = "7"
    assert "does not even allow h = 1" in recommend(replace(chaotic, config=config_with(*flags))).advice["Budgets"]
    no_block = ["--estimator", "rlr-paper", "--ho_blocks", "0", "--nfe_budget", "100"]
    without_blocks = recommend(replace(chaotic, config=config_with(*no_block))).advice["Budgets"]
    assert "with ho_blocks 0 there is no block" in without_blocks
    assert "Budgets" not in recommend(chaotic).advice
    special = replace(chaotic.profile, hot_steps={1: 5.0, 6: 4.0}, last_step_sensitivity=0.02)
    advice = recommend(replace(chaotic, profile=special)).advice
    assert "the pathwise gradient covers it" in advice["Hot steps"] and "very noisy" in advice["Hot steps"]
    assert "nearly dead" in advice["Last step"] and "trailing" in advice["Last step"]
    assert "Last step" not in recommend(chaotic).advice


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
        with pytest.raises(DiagnosisError, match=message):
            gather_evidence(chain, objective, [bad], sketch, 2, show_progress=False)


def test_the_tape_counts_storages_once_and_no_weights() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 5))
    x = torch.randn(7, 5, requires_grad=True)
    with counted_tape() as tape:
        y = x * x + (x @ weight.T) * x
        assert tape.live == 2 * 7 * 5 * 4  # x once, and x @ weight.T
        del y
        assert tape.live == 0 and tape.peak == 2 * 7 * 5 * 4


def test_numbers_in_words() -> None:
    assert [short_number(v) for v in (0.0, 0.12345, 4.4067, 10370.2, 3.2e-5, float("inf"))] == [
        "0",
        "0.123",
        "4.41",
        "10,370",
        "3.2e-05",
        "infinite",
    ]
    assert with_error(0.12661, 0.03381) == "0.127 ± 0.034"
    assert with_error(3e-7, 2e-8) == "3e-07 ± 2e-08"


def assert_self_contained(html: str) -> None:
    assert "http" not in html and "@import" not in html and "url(" not in html and "<link" not in html
    assert "<script" not in html
    assert re.findall(r'src="([^"]{0,22})', html) == ["data:image/png;base64,"]
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\{#", html)


def test_the_report_is_one_page_with_numbers_and_figure_beside_it(chaotic: Diagnosis, tmp_path: Path) -> None:
    advice = recommend(chaotic)
    page, numbers, picture = write_report(tmp_path / "new" / "report.html", chaotic, advice)
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json", "report.png"]
    html = page.read_text(encoding="utf-8")
    assert_self_contained(html)
    assert "linear &lt;chain&gt;" in html and "linear <chain>" not in html
    assert "<code>--ho_length 1</code>" in html and "`" not in html
    data = json.loads(numbers.read_text())
    assert [row["name"] for row in data["methods"]] == [r.method.name for r in chaotic.results]
    assert data["profile"]["steps"] == [1, 2, 3, 4, 5, 6] and len(data["profile"]["energy"]) == 6
    with Image.open(picture) as figure:
        assert figure.format == "PNG" and figure.width == 1000
    text = console_text(chaotic, advice)
    assert advice.flags in text and max(len(line) for line in text.splitlines()) <= 120


def test_the_command_end_to_end(tmp_path: Path) -> None:
    pipeline = tiny_stable_diffusion("v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)  # sigma_1 = 0
    pipeline.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("red ball\nblue box\ngreen tree\n")
    (tmp_path / "rewards.py").write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    config = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "prompt_path": tmp_path / "prompts.txt",
        "reward_fn": f"{tmp_path / 'rewards.py'}:redness",
        "num_inference_steps": 3,
        "train_batch_size": 2,
        "num_images_per_prompt": 2,
    }
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in config.items()))
    words = ["--config", str(path), "--samples", "3", "--output", str(tmp_path / "out" / "report.html"), "--rank", "2"]
    done = completed(["-m", "rlr_peft.cli", "diagnose", *words, "--samples", "5"])
    assert done.returncode == 0, done.stderr
    assert "Recommendation" in done.stdout and "full-bp" in done.stdout
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (data["num_samples"], data["num_steps"], data["config"]["rank"]) == (6, 3, 2)
    assert data["facts"]["base"] == "base" and "LoRA of rank 2" in data["facts"]["trained"]
    names = {row["name"] for row in data["methods"]}
    assert {"full-bp", "reinforce", "ddpo", "grpo", "d3po", "refl", "rlr-paper", "rlr, mixed orders"} <= names
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert_self_contained(html)
    assert str(tmp_path) not in html
    with Image.open(tmp_path / "out" / "report.png") as figure:
        assert figure.format == "PNG"
