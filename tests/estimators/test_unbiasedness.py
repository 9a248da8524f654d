"""Every preset's expectation against the closed-form gradient of a linear-Gaussian chain.

Each test draws many independent gradient estimates with fixed seeds and compares their mean with the exact gradient,
component by component, at a familywise confidence of 99 % (Bonferroni over the components of all tests of the table).
"""

import pytest

from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.plan import RLRSettings
from rlr_peft.estimators.zeroth_order import ZerothOrder
from rlr_peft.testing.unbiasedness import EstimatorBias, critical_z, measure_bias

SINGLE = HalfOrder(length=1, blocks="all")
T = 6

UNBIASED = {
    "rlr (auto)": RLRSettings("auto", SINGLE),
    "full backpropagation": RLRSettings(T, None),
    "FO_1 + all single steps": RLRSettings(1, SINGLE),
    "FO_3 + all single steps": RLRSettings(3, SINGLE),
    "FO_1 + tiles of h = 2": RLRSettings(1, HalfOrder(2, "all")),
    "FO_2 + tiles of h = 3": RLRSettings(2, HalfOrder(3, "all")),
    "FO_1 + 2 random single steps, 1/q": RLRSettings(1, HalfOrder(1, 2)),
    "FO_1 + 1 random block of h = 2, 1/q": RLRSettings(1, HalfOrder(2, 1)),
    "FO_1 + 2 blocks by gradient norm, 1/q": RLRSettings(1, HalfOrder(1, 2, "gradient-norm")),
}
PERTURBED = {
    "rlr-paper, h = 2, two-point s = .01": RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.01)),
    "rlr-paper, window, two-point s = .01": RLRSettings(
        1, HalfOrder(2, 1, "window", (3, 4)), ZerothOrder("two-point", 0.01)
    ),
    "rlr-paper, gradient norm, two-point s = .01": RLRSettings(
        1, HalfOrder(2, 1, "gradient-norm"), ZerothOrder("two-point", 0.01)
    ),
    "rlr-paper, one-point s = .1": RLRSettings(1, HalfOrder(2, 1), ZerothOrder("one-point", 0.1)),
    "FO_2 + ZO two-point s = .01": RLRSettings(2, None, ZerothOrder("two-point", 0.01)),
}
CRITICAL = critical_z(comparisons=12 * (len(UNBIASED) + len(PERTURBED) + 4), confidence=0.99)


def bias_of(settings: RLRSettings, **arguments) -> EstimatorBias:
    return measure_bias(settings, num_steps=T, **{"seed": 1, **arguments})


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name: str) -> None:
    bias = bias_of(UNBIASED[name])
    assert bias.max_abs_z < CRITICAL, bias
    assert bias.projection == pytest.approx(1, abs=0.1), "the test must resolve a bias of 10 %"
    assert bias.coverage_complete


@pytest.mark.parametrize("name", PERTURBED)
def test_unbiased_with_perturbed_parameters(name: str) -> None:
    bias = bias_of(PERTURBED[name], calls=4000, replicates=1, group_size=16)
    assert bias.max_abs_z < CRITICAL, bias
    assert bias.projection == pytest.approx(1, abs=0.3)
    assert bias.coverage_complete


@pytest.mark.parametrize("settings", [RLRSettings("auto", SINGLE), RLRSettings(1, SINGLE, black_box_steps=3)])
def test_unbiased_without_a_reward_gradient_where_every_step_has_noise(settings: RLRSettings) -> None:
    bias = bias_of(settings, differentiable=False, last_std=0.2)
    assert bias.max_abs_z < CRITICAL, bias
    assert bias.projection == pytest.approx(1, abs=0.1)
    assert bias.coverage_complete


def test_reinforce_is_unbiased_where_every_step_has_noise() -> None:
    bias = bias_of(RLRSettings(0, SINGLE), last_std=0.2)
    assert bias.max_abs_z < CRITICAL, bias
    assert bias.projection == pytest.approx(1, abs=0.1)
    assert bias.coverage_complete


def test_unbiased_without_a_baseline() -> None:
    bias = bias_of(RLRSettings(1, SINGLE), group_size=1, replicates=800)
    assert bias.max_abs_z < CRITICAL, bias
    assert bias.projection == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        pytest.param(RLRSettings(1, None), {}, id="truncated-bp K=1"),
        pytest.param(RLRSettings(3, None), {}, id="truncated-bp K=3"),
        pytest.param(RLRSettings(1, HalfOrder(1, 1, "window", (3, 4))), {}, id="window without ZO"),
        pytest.param(
            RLRSettings("auto", SINGLE), {"differentiable": False, "last_std": 0.0}, id="no gradient, sigma_1 = 0"
        ),
    ],
)
def test_bias_by_choice_is_detected_and_declared(settings: RLRSettings, arguments: dict) -> None:
    bias = bias_of(settings, **arguments)
    assert bias.max_abs_z > 10, bias
    assert not bias.coverage_complete


def test_zeroth_order_is_biased_at_a_large_scale() -> None:
    bias = bias_of(RLRSettings(0, None, ZerothOrder("two-point", 1.0)), calls=4000, replicates=1, group_size=16)
    assert bias.max_abs_z > CRITICAL, bias
