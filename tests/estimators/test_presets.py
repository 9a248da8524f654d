"""From the config's names to estimators."""

from typing import Any

import pytest

from rlr_peft.config import METHODS, EstimatorArguments
from rlr_peft.estimators import (
    Coefficients,
    HalfOrder,
    PathwiseEstimator,
    PolicyGradientEstimator,
    PreferenceEstimator,
    RLREstimator,
    RLRSettings,
    RunShape,
    ZerothOrder,
    build_estimator,
    settings_from_arguments,
)

SINGLE = HalfOrder(1, "all")


def method(estimator: str = "rlr", **knobs: Any) -> EstimatorArguments:
    return METHODS[estimator](**knobs)


def test_presets_of_the_rlr_family() -> None:
    assert settings_from_arguments(method(), RunShape(50)) == RLRSettings(
        "auto", SINGLE, None, black_box_steps=17, roulette=True
    )
    paper = settings_from_arguments(method(estimator="rlr-paper"), RunShape(50))
    assert paper == RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.01))
    assert settings_from_arguments(method(estimator="reinforce"), RunShape(50)) == RLRSettings(0, SINGLE)
    assert not settings_from_arguments(method(fo_roulette=False), RunShape(50)).roulette


def test_the_other_methods_are_built_from_their_knobs() -> None:
    ddpo = build_estimator(method(estimator="ddpo", clip_range=0.1, ho_blocks=3), RunShape(50))
    assert isinstance(ddpo, PolicyGradientEstimator) and ddpo.inner_epochs == 2
    assert ddpo.steps == HalfOrder(1, 3) and ddpo.arguments.clip_range == 0.1
    grpo = build_estimator(method(estimator="grpo", inner_epochs=3, advantage_clip=2.0), RunShape(50))
    assert isinstance(grpo, PolicyGradientEstimator) and grpo.inner_epochs == 3
    assert grpo.steps == SINGLE and grpo.advantage_clip == 2.0
    arguments = method(estimator="d3po", dpo_beta=0.3, ho_blocks=2, ho_start="window", ho_window=(5, 9))
    d3po = build_estimator(arguments, RunShape(50))
    assert isinstance(d3po, PreferenceEstimator) and d3po.inner_epochs == 1
    assert d3po.beta == 0.3 and d3po.steps == HalfOrder(1, 2, "window", (5, 9))
    for fo_steps in (None, 3):
        refl = build_estimator(method(estimator="refl", fo_steps=fo_steps), RunShape(50))
        assert isinstance(refl, PathwiseEstimator)
        assert (refl.settings.steps, refl.settings.first_order_steps) == (
            "late",
            fo_steps,
        ) and refl.settings.sees_prediction


def test_explicit_values_replace_the_presets() -> None:
    arguments = method(
        estimator="rlr-paper", fo_steps=2, ho_length="auto", nfe_budget=160, ho_start="window", ho_window=(30, 40)
    )
    settings = settings_from_arguments(arguments, RunShape(50))
    # 160 evaluations - 50 sampling - 2 first order - 2 x 50 perturbed rollouts
    assert settings.half_order == HalfOrder(8, 1, "window", (30, 40))
    assert settings.first_order_steps == 2


@pytest.mark.parametrize(("num_steps", "expected"), [(50, 17), (10, 8), (4, 4), (1, 1)])
def test_the_black_box_tail_costs_about_3_chains(num_steps: int, expected: int) -> None:
    assert settings_from_arguments(method(), RunShape(num_steps)).black_box_steps == expected
    assert settings_from_arguments(method(black_box_steps=0), RunShape(num_steps)).black_box_steps == 0
    if num_steps > 6:
        assert expected * (expected - 1) / 2 == pytest.approx(3 * num_steps, rel=0.1)


def test_no_blocks_leave_the_half_order_out() -> None:
    perturbed = settings_from_arguments(method(estimator="rlr-paper", ho_blocks=0), RunShape(50))
    assert perturbed == RLRSettings(1, None, ZerothOrder("two-point", 0.01))


def test_the_options_of_the_rlr_family_reach_the_estimator() -> None:
    arguments = method(
        step_choice="inverse-variance", antithetic=True, fo_coefficient=0.5, ho_coefficient=2.0, zo_coefficient=3.0
    )
    estimator = build_estimator(arguments, RunShape(50))
    assert isinstance(estimator, RLREstimator) and estimator.antithetic
    assert estimator.settings.step_choice == "inverse-variance"
    assert estimator.settings.coefficients == Coefficients(0.5, 2.0, 3.0)
    with_baseline = build_estimator(method(state_baseline=True), RunShape(50))
    assert isinstance(with_baseline, RLREstimator) and with_baseline.settings.state_baseline


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"fo_roulette": False},
            "backpropagation through the last K steps, K measured (antithetic noise on the last 17 steps if the "
            "reward has no gradient); score terms on all other steps",
        ),
        (
            {"black_box_steps": 0, "fo_roulette": False},
            "backpropagation through the last K steps, K measured; score terms on all other steps",
        ),
        ({"step_choice": "inverse-variance"}, "backpropagation and score terms mixed at every step by their measured"),
        ({"estimator": "truncated-bp", "fo_steps": "random"}, "K drawn from 1..T"),
        ({}, "of each sample through a random number of them, weighted to stay unbiased"),
        ({"state_baseline": True, "antithetic": True}, "and a state baseline; antithetic noises"),
        ({"fo_coefficient": 0.5}, "coefficients 0.5, 1, 1 of the three orders"),
        ({"estimator": "rlr-paper"}, "two-point zeroth order with s = 0.01 on the rest"),
        (
            {"estimator": "ddpo", "ho_blocks": 3},
            "clipped policy gradient on 3 drawn steps, per-prompt statistics advantages, ratios clipped at 0.2, "
            "2 inner epochs",
        ),
        ({"estimator": "grpo"}, "clipped policy gradient on all steps, group-normalised advantages"),
        ({"estimator": "grpo", "advantage_std": "update"}, "on all steps, update-normalised advantages"),
        ({"estimator": "ddpo", "divergence_limit": 0.5}, "statistics advantages, masked beyond 0.5 nats, 2 inner"),
        (
            {"estimator": "grpo", "ratio_norm": True},
            "advantages, normalised ratios clipped at 0.2, 1 inner",
        ),
        ({"estimator": "d3po"}, "direct preference optimisation of pairs on all steps, beta 0.1"),
        (
            {"estimator": "nft", "norm_penalty": 2.0},
            "DiffusionNFT with beta 1 on 9 fresh noisings of every image, group-normalised advantages clipped at 5, "
            "old weights with decay up to 0.5, pull to the base 0.0001, norm penalty 2",
        ),
        ({"estimator": "awm", "inner_epochs": 2}, "clipped at 1, pull to the old 1 on 6 fresh noisings"),
        ({"estimator": "refl"}, "predicted image's reward through a random one of the last quarter of the steps"),
        ({"estimator": "refl", "fo_steps": 3}, "through a random one of the last 3 steps"),
    ],
)
def test_every_estimator_describes_itself(arguments: dict, words: str) -> None:
    assert words in build_estimator(method(**arguments), RunShape(50)).describe()


def test_a_description_follows_the_reward_once_that_is_known() -> None:
    estimator = build_estimator(method(fo_roulette=False), RunShape(50))
    beyond = "; score terms on all other steps"
    assert estimator.describe(has_gradient=True) == "backpropagation through the last K steps, K measured" + beyond
    assert estimator.describe(has_gradient=False) == "antithetic noise on the last 17 steps" + beyond
    plain = build_estimator(method(estimator="reinforce"), RunShape(50))
    assert plain.describe(has_gradient=False) == "score terms on all steps"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, True),
        ({"estimator": "full-bp"}, True),
        ({"estimator": "truncated-bp", "fo_steps": "random"}, True),
        ({"estimator": "refl"}, True),
        ({"fo_steps": 0}, True),  # whether there is one decides on the black-box tail
        ({"estimator": "reinforce"}, False),
        ({"estimator": "ddpo"}, False),
        ({"estimator": "grpo"}, False),
        ({"estimator": "d3po"}, False),
        ({"estimator": "ram"}, False),
    ],
)
def test_only_estimators_that_use_a_rewards_gradient_ask_for_it(arguments: dict, expected: bool) -> None:
    assert build_estimator(method(**arguments), RunShape(50)).uses_reward_gradient == expected


def test_a_budget_that_cannot_decide_the_length_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers for ho_blocks and fo_steps"):
        settings_from_arguments(method(ho_length="auto", nfe_budget=160), RunShape(50))
