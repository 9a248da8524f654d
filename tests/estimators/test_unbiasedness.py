"""Every method's expectation against the closed-form gradient of a linear-Gaussian chain.

Each test draws many independent gradient estimates with fixed seeds and compares their mean with the exact gradient,
component by component, at a familywise confidence of 99 % (Bonferroni over the components of all tests of the file).
A method either passes and says that it is unbiased, or fails by far and says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from rlr_peft.chain import Chain, Trajectory
from rlr_peft.config import D3POArguments, DDPOArguments, GRPOArguments, ReFLArguments, TruncatedBPArguments
from rlr_peft.estimators import (
    Coefficients,
    Estimator,
    HalfOrder,
    PathwiseEstimator,
    PolicyGradientEstimator,
    RLREstimator,
    RLRSettings,
    Rollout,
    RunShape,
    StateBaseline,
    StepVariances,
    ZerothOrder,
    build_estimator,
    leave_one_out,
)
from rlr_peft.testing import EstimatorBias, LinearGaussianChain, critical_z, measure_bias

SINGLE = HalfOrder(length=1, blocks="all")
T = 6


class EvenlyMixed(RLREstimator):
    """Measures equal variances everywhere, so that every step with noise gets weight 1/2 of both terms."""

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], advantages: torch.Tensor, decay: float) -> None:
        noisy = torch.tensor([chain.std(t) > 0 for t in range(1, chain.num_steps + 1)])
        ones = torch.ones(chain.num_steps, dtype=torch.float64)
        self.statistics.variances = StepVariances(ones, ones, noisy)


class UndividedPolicyGradient(PolicyGradientEstimator):
    """A policy gradient whose advantages are not divided by a standard deviation."""

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        return leave_one_out(rewards, group_size)


# Samples drop out of the batch one by one, which only a chain without copies can follow.
ROULETTE = {"replicates": 1, "group_size": 16, "calls": 600}
UNBIASED: dict[str, tuple[RLRSettings, dict]] = {
    "rlr (auto)": (RLRSettings("auto", SINGLE), {}),
    "full backpropagation": (RLRSettings(T, None), {}),
    "roulette tail": (RLRSettings("auto", SINGLE, roulette=True), ROULETTE),
    "roulette tail of 3, score terms beyond": (RLRSettings(3, SINGLE, roulette=True), ROULETTE),
    "FO_1 + all single steps": (RLRSettings(1, SINGLE), {}),
    "FO_3 + all single steps": (RLRSettings(3, SINGLE), {}),
    "FO_1 + tiles of h = 2": (RLRSettings(1, HalfOrder(2, "all")), {}),
    "FO_2 + tiles of h = 3": (RLRSettings(2, HalfOrder(3, "all")), {}),
    "FO_1 + 2 random single steps, 1/q": (RLRSettings(1, HalfOrder(1, 2)), {}),
    "FO_1 + 1 random block of h = 2, 1/q": (RLRSettings(1, HalfOrder(2, 1)), {}),
    "FO_1 + 2 blocks by gradient norm, 1/q": (RLRSettings(1, HalfOrder(1, 2, "gradient-norm")), {}),
    "FO_1 + all single steps, no baseline": (RLRSettings(1, SINGLE), {"group_size": 1, "replicates": 400}),
    "orders mixed by measured variances": (RLRSettings("auto", SINGLE, step_choice="inverse-variance"), {}),
    "FO_1 + all single steps, state baseline": (RLRSettings(1, SINGLE, state_baseline=True), {}),
    "FO_2 + tiles of h = 2, state baseline": (RLRSettings(2, HalfOrder(2, "all"), state_baseline=True), {}),
    "reinforce where every step has noise": (RLRSettings(0, SINGLE), {"last_std": 0.2}),
    "rlr without a reward gradient": (RLRSettings("auto", SINGLE), {"differentiable": False, "last_std": 0.2}),
    "black-box tail": (RLRSettings(1, SINGLE, black_box_steps=3), {"differentiable": False, "last_std": 0.2}),
}
PERTURBED = {
    "rlr-paper, h = 2, two-point s = .01": RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.01)),
    "rlr-paper, gradient norm, two-point s = .01": RLRSettings(
        1, HalfOrder(2, 1, "gradient-norm"), ZerothOrder("two-point", 0.01)
    ),
    "rlr-paper, one-point s = .1": RLRSettings(1, HalfOrder(2, 1), ZerothOrder("one-point", 0.1)),
    "FO_2 + ZO two-point s = .01": RLRSettings(2, None, ZerothOrder("two-point", 0.01)),
}
CRITICAL = critical_z(comparisons=12 * (len(UNBIASED) + len(PERTURBED) + 5), confidence=0.99)


def bias_of(estimator: Estimator, **arguments) -> EstimatorBias:
    return measure_bias(estimator, num_steps=T, **{"seed": 1, "calls": 150, "replicates": 200, **arguments})


def assert_unbiased(bias: EstimatorBias, resolution: float = 0.1) -> None:
    assert bias.max_abs_z < CRITICAL, bias
    assert bias.projection == pytest.approx(1, abs=resolution), "the test must resolve a bias of this size"


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name: str) -> None:
    settings, arguments = UNBIASED[name]
    bias = bias_of(RLREstimator(settings), **arguments)
    assert_unbiased(bias)
    assert bias.coverage.unbiased


@pytest.mark.parametrize("last_std", [0.0, 0.2])
def test_half_and_half_mixed_orders_are_unbiased(last_std: float) -> None:
    bias = bias_of(EvenlyMixed(RLRSettings("auto", SINGLE, step_choice="inverse-variance")), last_std=last_std)
    assert_unbiased(bias)
    assert bias.coverage.unbiased


@pytest.mark.parametrize("name", PERTURBED)
def test_unbiased_with_perturbed_parameters(name: str) -> None:
    """Up to the smoothing, which no test resolves at these scales and which the coverage tells."""
    bias = bias_of(RLREstimator(PERTURBED[name]), calls=1500, replicates=1, group_size=32)
    assert_unbiased(bias, resolution=0.3)
    assert bias.coverage.complete and not bias.coverage.unbiased
    assert "smoothed at s = " in bias.coverage.describe()


def test_zeroth_order_is_biased_at_a_large_scale() -> None:
    estimator = RLREstimator(RLRSettings(0, None, ZerothOrder("two-point", 1.0)))
    assert bias_of(estimator, calls=900, replicates=1, group_size=32).max_abs_z > CRITICAL


def test_antithetic_samples_need_their_partner_left_out_of_the_baseline() -> None:
    settings = RLRSettings(1, SINGLE)
    without_partner = bias_of(RLREstimator(settings, antithetic=True), antithetic=True)
    assert_unbiased(without_partner)
    assert without_partner.coverage.unbiased
    with_partner = bias_of(RLREstimator(settings), antithetic=True)
    assert with_partner.max_abs_z > 10, "the mirrored noise correlates the baseline with the sample"


def test_a_state_baseline_lowers_the_variance_and_one_that_sees_the_noise_is_biased(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prediction at step t is made from x_t; taken from x_{t-1} it would contain the noise of step t."""
    settings = RLRSettings(1, SINGLE, state_baseline=True)
    plain = bias_of(RLREstimator(replace(settings, state_baseline=False)), calls=100)
    estimator = RLREstimator(settings)
    assert bias_of(estimator, calls=100).variance < 0.5 * plain.variance
    baseline = StateBaseline()
    baseline.load_state_dict(estimator.state_dict()["state_baseline"])
    assert all(baseline.kappa(t) == pytest.approx(1, abs=0.1) for t in range(2, T + 1)), "what is tested must act"

    honest = LinearGaussianChain.sample

    def peeking(*arguments, **keywords) -> Trajectory:
        trajectory = honest(*arguments, **keywords)
        predictions = trajectory.pred_original_samples
        return replace(trajectory, pred_original_samples=torch.cat([trajectory.latents[:1], predictions[:-1]]))

    monkeypatch.setattr(LinearGaussianChain, "sample", peeking)
    assert bias_of(RLREstimator(settings), calls=100).max_abs_z > 10


@pytest.mark.parametrize("steps", [SINGLE, HalfOrder(1, 2)], ids=["all steps", "2 drawn steps"])
def test_a_policy_gradient_is_unbiased_but_for_the_division_by_the_deviation(steps: HalfOrder) -> None:
    estimator = UndividedPolicyGradient(GRPOArguments(ho_blocks=steps.blocks), RunShape(T))
    assert_unbiased(bias_of(estimator, last_std=0.2))


BIASED: dict[str, tuple[Callable[[], Estimator], dict, str]] = {
    "truncated-bp K=1": (
        lambda: PathwiseEstimator(TruncatedBPArguments(fo_steps=1)),
        {},
        "steps 2-6 of 6 are left out because the gradient is truncated",
    ),
    "truncated-bp K=3": (
        lambda: PathwiseEstimator(TruncatedBPArguments(fo_steps=3)),
        {},
        "steps 4-6 of 6 are left out because the gradient is truncated",
    ),
    "truncated-bp K random": (
        lambda: PathwiseEstimator(TruncatedBPArguments(fo_steps="random")),
        {},
        "steps 2-6 of 6 are left out at times because the gradient is truncated at a random step",
    ),
    "window without ZO": (
        lambda: RLREstimator(RLRSettings(1, HalfOrder(1, 1, "window", (3, 4)))),
        {},
        "steps 2, 5-6 of 6 are left out, outside the chosen window",
    ),
    "no gradient, sigma_1 = 0": (
        lambda: RLREstimator(RLRSettings("auto", SINGLE)),
        {"differentiable": False},
        "step 1 of 6 is left out because a score term needs noise there",
    ),
    "first order doubled": (
        lambda: RLREstimator(RLRSettings(3, SINGLE, coefficients=Coefficients(first_order=2.0))),
        {},
        "steps 1-3 of 6 are given another weight than 1 by the chosen coefficients",
    ),
    "half order halved": (
        lambda: RLREstimator(RLRSettings(1, SINGLE, coefficients=Coefficients(half_order=0.5))),
        {},
        "steps 2-6 of 6 are given another weight than 1 by the chosen coefficients",
    ),
    "grpo": (
        lambda: build_estimator(GRPOArguments(), RunShape(T)),
        {"last_std": 0.2},
        "advantages are divided by a standard deviation that contains the sample's own reward",
    ),
    "ddpo": (
        lambda: build_estimator(DDPOArguments(), RunShape(T)),
        {"last_std": 0.2, "calls": 30},
        "own reward; later inner epochs use samples of earlier weights, with clipped ratios",
    ),
    "d3po": (
        lambda: build_estimator(D3POArguments(), RunShape(T)),
        {"last_std": 0.2},
        "the likelihood of pairwise preferences is raised, not the expected reward",
    ),
    "refl": (
        lambda: PathwiseEstimator(ReFLArguments(fo_steps=2)),
        {},
        "the reward of the image predicted at a late step stands in for the image's",
    ),
}


@pytest.mark.parametrize("name", BIASED)
def test_bias_by_choice_is_detected_and_declared(name: str) -> None:
    build, arguments, reason = BIASED[name]
    bias = bias_of(build(), **{"calls": 100, **arguments})
    assert bias.max_abs_z > 10, bias
    assert not bias.coverage.unbiased
    described = bias.coverage.describe()
    assert described.startswith("The gradient is biased: ") and reason in described
