"""Costs, and what is recommended."""

import re
from dataclasses import replace

import pytest
import torch

from rlr_peft.config import load_config
from rlr_peft.diagnose import Diagnosis, diagnose, plain_numbers, recommend, stages_of
from rlr_peft.estimators import DecodedReward, sample_batch
from rlr_peft.lora import adapter_disabled, attach_lora
from rlr_peft.rewards import CallableReward
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.diagnose.diagnoses import (
    REQUIRED,
    WavyReward,
    chaotic_chain,
    config_with,
    diagnosis_of,
    result_of,
)
from tests.pipelines import chain_over, tiny_stable_diffusion


def test_stages_are_the_thirds_of_the_chain() -> None:
    energy = torch.tensor([1.0, 1, 1, 1, 1, 1, 4, 0, 0, 0])
    stages = stages_of(10, energy)
    assert [(s.name, s.first_step, s.last_step) for s in stages] == [("coarse", 8, 10), ("mid", 4, 7), ("fine", 1, 3)]
    assert sum(s.energy_share for s in stages) == pytest.approx(1)
    assert stages[1].energy_share == pytest.approx(0.7)
    assert len(stages_of(1, None)) == 1


def test_costs_are_what_running_costs(linear: Diagnosis) -> None:
    expected = {
        "full-bp": (12, 6),
        "truncated-bp, K = 1": (7, 1),
        "truncated-bp, K = 2": (8, 2),
        "rlr, K = 1": (12, 6),
        "rlr, K = 6 (measured)": (12, 6),
        "reinforce": (12, 6),
        "ddpo": (12, 6),
        "grpo": (12, 6),
        "d3po": (18, 6),
        "rlr, K = 1, blocks of h = 2": (12, 6),
        "zeroth order on all steps": (18, 0),
        "rlr-paper": (6 + 1 + 2 + 12, 3),
        **dict.fromkeys(("ram", "nft", "awm"), (6 + 3 * 6, 6)),
        "refl": (7, 1),
        "draft-lv": (11, 3),
        "leap": (8, 2),
        "drtune": (9, 3),
        "flowbp-sparse": (9, 3),
        "flowbp-bridge": (11, 5),
        "rsm": (9, 3),
    }
    for name, (evaluations, backwards) in expected.items():
        cost = result_of(linear, name).cost
        assert (cost.denoiser_evaluations, cost.backward_passes) == (evaluations, backwards), name
        assert cost.work == evaluations + 2 * backwards
        assert 0.5 < cost.seconds < 5
        assert (cost.peak_bytes > 0) == (backwards > 0), name
    assert linear.cost_samples == 4
    assert {result.method.name for result in linear.results} >= set(expected)


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
        batch.rollouts,
        config,
        group_size=2,
        sampling_seconds=0.0,
        facts={},
    )
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_the_reference_is_the_least_noisy_unbiased_method(linear: Diagnosis, without_gradient: Diagnosis) -> None:
    unbiased = [r for r in linear.results if r.coverage.unbiased and len(r.estimates.samples) == 32]
    assert linear.reference.estimates.variance == min(r.estimates.variance for r in unbiased)
    # Nothing can cover the last step of this chain, so the reference leaves out that one and nothing else.
    assert not any(r.coverage.unbiased for r in without_gradient.results)
    assert without_gradient.reference.coverage.weights.tolist() == [0, 1, 1, 1, 1, 1]
    assert not without_gradient.reference.coverage.departures


def test_the_whole_chain_is_differentiated_where_pathwise_gradients_hardly_vary(linear: Diagnosis) -> None:
    advice = recommend(linear)
    assert "`--estimator rlr --fo_steps 6`" in advice.advice["First order"]
    assert "full backpropagation" in advice.advice["First order"]
    assert advice.advice["Score terms"] == "No step needs a score term."
    assert (
        result_of(linear, "rlr, K = 6 (measured)").estimates.variance
        < result_of(linear, "reinforce").estimates.variance
    )


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
        return recommend(replace(chaotic, results=results)).advice["Mixed orders"]

    squares = crossing.estimates.squares
    assert "`--estimator rlr --step_choice inverse-variance`" in with_squares(squares * 0.5)
    assert "does not pay" in with_squares(squares)
    assert "does not pay" in with_squares(0.99 * squares.roll(1))  # better on average, but within the error


def test_weak_evidence_is_called_weak(chaotic: Diagnosis) -> None:
    few = diagnosis_of(chaotic_chain(), WavyReward(chaotic_chain()), 8)
    assert "evidence for this K is weak" in recommend(few).advice["First order"]
    assert "Cosines say little here" in recommend(few).advice["Evidence"]


def test_recommended_flags_can_be_trained_with(
    linear: Diagnosis, chaotic: Diagnosis, without_gradient: Diagnosis
) -> None:
    for diagnosis in (linear, chaotic, without_gradient):
        advice = recommend(diagnosis)
        told = " ".join(advice.advice.values())
        texts = [advice.flags, *re.findall(r"`(--estimator rlr --fo_steps \d+ --ho_blocks[^`]*)`", told)]
        for flags in texts:
            load_config([*REQUIRED, "--num_inference_steps", "6", *flags.split()])


def test_a_reward_without_gradient_gets_a_black_box_tail(without_gradient: Diagnosis) -> None:
    left_out = without_gradient.compared.left_out
    for name in ("full-bp", "truncated-bp", "refl"):
        assert left_out[name] == "the reward has no gradient"
    assert not any("pathwise" in r.method.name or "refl" in r.method.name for r in without_gradient.results)
    steps = without_gradient.compared.black_box_steps
    assert steps >= 2
    advice = recommend(without_gradient)
    assert advice.flags == f"--estimator rlr --black_box_steps {steps}"
    assert "of the least biased methods" in advice.answer[0]
    assert "Nothing can cover step 1, where there is no noise" in advice.advice["Score terms"]
    chosen = result_of(without_gradient, f"rlr, black-box tail of {steps} (measured)")
    assert chosen.cost.denoiser_evaluations == 6 + 5 + sum(t - 1 for t in range(2, steps + 1))
    numbers = plain_numbers(without_gradient, advice)
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
