"""The terms one by one: advantages, blocks and their draws, coverage, presets, planning, perturbation, variances."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlr_peft.config import EstimatorArguments
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.coverage import Coverage, CoverageError
from rlr_peft.estimators.half_order import (
    Block,
    HalfOrder,
    draw,
    draw_probabilities,
    expected_draws,
    free_blocks,
    tiles,
)
from rlr_peft.estimators.plan import Plan, RLRSettings
from rlr_peft.estimators.planning import crossing, half_order_length_for_compute, half_order_length_for_memory
from rlr_peft.estimators.presets import settings_from_arguments
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.estimators.step_variance import StepVariances, measure_step_variances
from rlr_peft.estimators.zeroth_order import ZerothOrder
from rlr_peft.testing.linear_gaussian_chain import LinearGaussianChain, QuadraticReward


def rollout_of(chain: LinearGaussianChain, samples: int, group_size: int, seed: int = 0) -> Rollout:
    trajectory = chain.sample([""] * samples, list(range(seed, seed + samples)))
    rewards, gradient = QuadraticReward(chain).score_with_gradient(trajectory.latents[0], trajectory.prompts)
    return Rollout(trajectory, rewards, leave_one_out(rewards, group_size), gradient)


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0]
    torch.testing.assert_close(leave_one_out(rewards, 3), torch.tensor(expected))
    assert torch.equal(leave_one_out(rewards, 1), rewards)
    with pytest.raises(ValueError, match="multiple of 4"):
        leave_one_out(rewards, 4)


@given(first=st.integers(1, 5), extent=st.integers(1, 30), length=st.integers(1, 8))
def test_tiles_partition_the_steps(first: int, extent: int, length: int) -> None:
    blocks = tiles(first, first + extent - 1, length)
    assert [t for block in blocks for t in block.steps] == list(range(first, first + extent))
    assert all(block.length == length for block in blocks[:-1])


def test_no_tile_starts_at_a_noiseless_step() -> None:
    assert tiles(1, 6, 4, noiseless=[1]) == [Block(2, 4), Block(6, 1)]
    assert tiles(1, 6, 2, noiseless=[1, 3]) == [Block(2, 2), Block(4, 2), Block(6, 1)]


def test_free_blocks_start_anywhere_they_fit() -> None:
    assert free_blocks(2, 5, 3) == [Block(2, 3), Block(3, 3)]


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("start", ["uniform", "gradient-norm", "window"])
def test_blocks_are_drawn_as_often_as_their_weights_assume(start: str, num_draws: int) -> None:
    blocks = tiles(2, 9, 2)
    half_order = HalfOrder(2, num_draws, start, (4, 9) if start == "window" else None)
    probabilities = draw_probabilities(blocks, half_order, {2: 0.0, 4: 2.0, 6: 1.0}, defensive_share=0.1)
    assert probabilities.sum().item() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    trials = 4000
    counts = Counter(i for _ in range(trials) for i in draw(probabilities, num_draws, generator))
    for i, expectation in enumerate(expected_draws(probabilities, num_draws).tolist()):
        # Each count is a sum of `trials` draws with variance at most `num_draws`: 5 standard deviations.
        assert counts[i] / trials == pytest.approx(expectation, abs=5 * math.sqrt(num_draws / trials))


def test_softmax_of_gradient_norms_is_the_papers() -> None:
    blocks = free_blocks(2, 4, 1)
    probabilities = draw_probabilities(blocks, HalfOrder(1, 1, "gradient-norm"), {2: 0.5, 3: 1.5, 4: 0.0})
    expected = torch.tensor([0.5, 1.5, 0.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(probabilities, expected)
    unknown = draw_probabilities(blocks, HalfOrder(1, 1, "gradient-norm"), {2: 1.0})
    torch.testing.assert_close(unknown, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_window_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"starts within steps 8\.\.9"):
        draw_probabilities(tiles(2, 5, 2), HalfOrder(2, 1, "window", (8, 9)), {})


EVERY_MODE = [
    RLRSettings(k, half_order, zeroth_order, black_box_steps=2)
    for k in (0, 1, 3, 6)
    for half_order in (
        None,
        HalfOrder(1, "all"),
        HalfOrder(4, "all"),
        HalfOrder(2, 1),
        HalfOrder(1, 2),
        HalfOrder(2, 2, "gradient-norm"),
        HalfOrder(1, 1, "window", (4, 5)),
    )
    for zeroth_order in (None, ZerothOrder("two-point", 0.01))
    if not (zeroth_order and half_order and half_order.blocks not in (1,))
]


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("last_std", [0.0, 0.2])
def test_realised_weights_average_to_the_declared_coverage(differentiable: bool, last_std: float) -> None:
    """Over many plans, every mode covers each step as often as it says: exactly, or within 6 standard errors."""
    chain = LinearGaussianChain(num_steps=6, last_std=last_std)
    generator = torch.Generator().manual_seed(0)
    for settings in EVERY_MODE:
        estimator = RLREstimator(settings)
        estimator.remember([(2, 1.0), (4, 0.1)])
        if not _has_a_term(settings, differentiable):
            with pytest.raises(CoverageError, match="a term for this reward"):
                estimator.plan(chain, differentiable, generator)
            continue
        is_random = settings.half_order is not None and settings.half_order.blocks != "all"
        plans = [estimator.plan(chain, differentiable, generator) for _ in range(400 if is_random else 2)]
        realised = torch.stack([_realised_weights(plan) for plan in plans])
        declared = plans[0].coverage.weights
        tolerance = 6 * realised.std(0) / math.sqrt(len(plans)) + 1e-9
        assert torch.all((realised.mean(0) - declared).abs() <= tolerance), settings
        assert set(plans[0].coverage.gaps) == {t for t in range(1, 7) if declared[t - 1] == 0}


def _realised_weights(plan: Plan) -> torch.Tensor:
    weights = torch.zeros(6, dtype=torch.float64)
    for t in [*range(1, plan.first_order_steps + 1), *plan.black_box_steps, *plan.zeroth_order_steps]:
        weights[t - 1] += 1
    for block, weight in plan.blocks:
        weights[block.first_step - 1 : block.steps[-1]] += weight
    return weights


def test_the_zeroth_order_takes_noiseless_steps_that_mirroring_cannot() -> None:
    estimator = RLREstimator(RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.01), black_box_steps=3))
    plan = estimator.plan(LinearGaussianChain(num_steps=6), False, torch.Generator())
    assert plan.black_box_steps == [2, 3] and 1 in plan.zeroth_order_steps
    assert plan.coverage.complete


def _has_a_term(settings: RLRSettings, differentiable: bool) -> bool:
    tail = settings.first_order_steps if differentiable else settings.black_box_steps
    return bool(tail or settings.half_order or settings.zeroth_order)


def test_coverage_is_checked_and_described() -> None:
    with pytest.raises(CoverageError, match=r"coverage 1 at step 2 of 3, got 0\.5"):
        Coverage(torch.tensor([1.0, 0.5, 1.0]), {}).check()
    gaps = Coverage(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]), {2: "chosen", 3: "chosen", 5: "no noise"})
    gaps.check()
    assert gaps.describe() == "Biased by choice: steps 2-3, 5 of 5 are left out (chosen; no noise)."
    assert "unbiased" in Coverage(torch.ones(3), {}).describe()
    smoothed = Coverage(torch.ones(3), {}, smoothing=0.5).describe()
    assert "unbiased" not in smoothed and "smoothed at s = 0.5" in smoothed


def test_crossing_minimises_the_summed_variance() -> None:
    first_order = torch.tensor([0.1, 0.2, 0.15, 6.4, 8.0])
    half_order = torch.tensor([torch.inf, 40.0, 0.17, 0.06, 0.05])
    assert crossing(first_order, half_order) == 3
    assert crossing(first_order, torch.full((5,), torch.inf)) == 5
    assert crossing(torch.full((5,), torch.inf), half_order.nan_to_num(posinf=9.0)) == 0


@pytest.mark.parametrize(("budget", "expected"), [(8 + 0.24 * 48, 1), (30, 2), (40, 3), (1000, 49)])
def test_the_papers_memory_rule(budget: float, expected: int) -> None:
    """B_h = 8 GB, B_z = .24 GB, T = 50; with 30 to 40 GB the paper uses h = 2."""
    assert half_order_length_for_memory(budget, 8.0, 0.24, 50) == expected
    with pytest.raises(ValueError, match=r"memory_budget >= 19\.52 GB"):
        half_order_length_for_memory(12, 8.0, 0.24, 50)


def test_the_compute_rule_spends_the_budget() -> None:
    assert half_order_length_for_compute(120, 50, 1, num_blocks=1, zeroth_order_evaluations=50) == 19
    assert half_order_length_for_compute(10_000, 50, 1, num_blocks=1, zeroth_order_evaluations=0) == 49
    with pytest.raises(ValueError, match="nfe_budget >= 52"):
        half_order_length_for_compute(51, 50, 1, num_blocks=1, zeroth_order_evaluations=0)


def test_presets() -> None:
    assert settings_from_arguments(EstimatorArguments(), 50) == RLRSettings(
        "auto", HalfOrder(1, "all"), None, black_box_steps=4
    )
    paper = settings_from_arguments(EstimatorArguments(estimator="rlr-paper"), 50)
    assert paper == RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.01))
    assert settings_from_arguments(EstimatorArguments(estimator="full-bp"), 50) == RLRSettings(50, None)
    assert settings_from_arguments(EstimatorArguments(estimator="truncated-bp", fo_steps=5), 50) == RLRSettings(5, None)
    assert settings_from_arguments(EstimatorArguments(estimator="reinforce"), 50) == RLRSettings(0, HalfOrder(1, "all"))


def test_explicit_values_replace_the_presets() -> None:
    arguments = EstimatorArguments(
        estimator="rlr-paper", fo_steps=2, ho_length="auto", nfe_budget=160, ho_start="window", ho_window=(30, 40)
    )
    settings = settings_from_arguments(arguments, 50)
    # 160 evaluations - 50 sampling - 2 first order - 2 x 50 perturbed rollouts
    assert settings.half_order == HalfOrder(8, 1, "window", (30, 40))
    assert settings.first_order_steps == 2


def test_a_budget_that_cannot_decide_the_length_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers for ho_blocks and fo_steps"):
        settings_from_arguments(EstimatorArguments(ho_length="auto", nfe_budget=160), 50)


def test_block_norms_of_all_micro_batches_make_one_running_mean() -> None:
    estimator = RLREstimator(RLRSettings(), norm_decay=0.5)
    estimator.remember([(2, 1.0), (2, 3.0), (4, 5.0)])
    estimator.remember([(2, 4.0)])
    assert estimator.state_dict()["running_norms"] == {2: 3.0, 4: 5.0}


def test_perturbation_is_undone_and_seeded() -> None:
    chain = LinearGaussianChain()
    before = [parameter.detach().clone() for parameter in chain.parameters]
    estimator = RLREstimator(RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.5, samples=2)))
    gradients = []
    for _ in range(2):
        estimator.accumulate(chain, QuadraticReward(chain), rollout_of(chain, 8, 4), torch.Generator().manual_seed(3))
        gradients.append([parameter.grad for parameter in chain.parameters])
        for parameter, original in zip(chain.parameters, before, strict=True):
            parameter.grad = None
            assert torch.equal(parameter, original)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_two_point_differences_on_all_steps_are_the_directional_derivative() -> None:
    """With the same noises the perturbed rewards differ by the pathwise derivative along u."""
    chain = LinearGaussianChain()
    rollout = rollout_of(chain, 16, 4)
    pathwise = RLREstimator(RLRSettings(6, None))
    pathwise.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator())
    exact = torch.cat([parameter.grad.flatten() for parameter in chain.parameters])
    for parameter in chain.parameters:
        parameter.grad = None
    zeroth = RLREstimator(RLRSettings(0, None, ZerothOrder("two-point", 1e-4)))
    zeroth.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator().manual_seed(5))
    estimate = torch.cat([parameter.grad.flatten() for parameter in chain.parameters])
    generator = torch.Generator().manual_seed(5)
    direction = torch.cat([torch.randn(p.shape, generator=generator).flatten() for p in chain.parameters]).double()
    torch.testing.assert_close(estimate, direction * (exact @ direction), rtol=1e-5, atol=1e-5)


def test_step_variances_are_those_of_single_sample_gradients() -> None:
    chain = LinearGaussianChain(num_steps=4)
    rollout = rollout_of(chain, 12, 4)
    measured = measure_step_variances(chain, [rollout.select(list(range(8))), rollout.select(list(range(8, 12)))])
    assert measured.half_order[0] == torch.inf  # sigma_1 = 0
    for t in (1, 2, 4):
        pathwise, score = [], []
        for i in range(12):
            sample = rollout.select([i])
            for parameter in chain.parameters:
                parameter.grad = None
            x = sample.trajectory.latents[t]
            later = chain.replay(sample.trajectory, t, x).next_latents(sample.trajectory.noise(t))
            for s in range(t - 1, 0, -1):
                with torch.no_grad():
                    frozen = [parameter.clone() for parameter in chain.parameters]
                later = _mean_with(chain, frozen, later, s) + chain.std(s) * sample.trajectory.noise(s)
            reward = QuadraticReward(chain).score(later, [""]).sum()
            pathwise.append(torch.cat([g.flatten() for g in torch.autograd.grad(reward, chain.parameters)]))
            if t > 1:
                mean = chain.replay(sample.trajectory, t).mean
                value = (mean * sample.score_cotangent(t)).sum()
                score.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, chain.parameters)]))
        assert measured.first_order[t - 1].item() == pytest.approx(torch.stack(pathwise).var(0).sum().item(), rel=1e-9)
        if score:
            assert measured.half_order[t - 1].item() == pytest.approx(torch.stack(score).var(0).sum().item(), rel=1e-9)


def _mean_with(chain: LinearGaussianChain, parameters: list, latents: torch.Tensor, t: int) -> torch.Tensor:
    trained, chain.parameters = chain.parameters, parameters
    try:
        return chain._mean(latents, t)
    finally:
        chain.parameters = trained


def test_running_variances_blend_and_survive_a_round_trip() -> None:
    old = StepVariances(torch.tensor([1.0, 2.0]), torch.tensor([torch.inf, 4.0]))
    new = StepVariances(torch.tensor([3.0, 4.0]), torch.tensor([torch.inf, 8.0]))
    blended = old.blend(new, decay=0.25)
    assert blended.first_order.tolist() == [2.5, 3.5]
    assert blended.half_order.tolist() == [math.inf, 7.0]
    estimator = RLREstimator(RLRSettings())
    estimator.step_variances = blended
    restored = RLREstimator(RLRSettings())
    restored.load_state_dict(estimator.state_dict())
    assert restored.step_variances is not None
    assert torch.equal(restored.step_variances.first_order, blended.first_order)


def test_hot_steps_under_a_score_term_are_named() -> None:
    chain = LinearGaussianChain(last_std=0.01)  # gain .3 against a noise of .01
    estimator = RLREstimator(RLRSettings(0, HalfOrder(1, "all")))
    plan = estimator.plan(chain, True, torch.Generator())
    assert estimator.hot_steps(chain, plan) == pytest.approx({1: 30.0})


def test_auto_needs_a_calibration() -> None:
    with pytest.raises(RuntimeError, match="calibrate"):
        RLREstimator(RLRSettings("auto")).plan(LinearGaussianChain(), True, torch.Generator())
