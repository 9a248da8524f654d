"""Which step is covered by which term: realised weights against the declared coverage, for every mode."""

import math
from dataclasses import replace

import pytest
import torch

from rlr_peft.estimators import (
    Coefficients,
    Coverage,
    CoverageError,
    HalfOrder,
    Layout,
    RLREstimator,
    RLRSettings,
    StepVariances,
    ZerothOrder,
    lay_out,
)
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import book_of_blocks, rollout_of

HALF_ORDERS = [
    None,
    HalfOrder(1, "all"),
    HalfOrder(4, "all"),
    HalfOrder(2, 1),
    HalfOrder(1, 2),
    HalfOrder(2, 2, "gradient-norm"),
    HalfOrder(1, 1, "window", (4, 5)),
]
EVERY_MODE = [
    RLRSettings(k, half_order, zeroth_order, black_box_steps=2)
    for k in (0, 1, 3, 6)
    for half_order in HALF_ORDERS
    for zeroth_order in (None, ZerothOrder("two-point", 0.01))
    if not (zeroth_order and half_order and half_order.blocks not in (1,))
]
UNEQUAL = Coefficients(first_order=0.5, half_order=2.0, zeroth_order=0.0)
EVERY_MODE += [replace(mode, coefficients=UNEQUAL) for mode in EVERY_MODE if mode.first_order_steps == 3]


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("last_std", [0.0, 0.2])
def test_realised_weights_average_to_the_declared_coverage(differentiable: bool, last_std: float) -> None:
    """Over many draws, every mode covers each step as often as it says: exactly, or within 6 standard errors."""
    chain = LinearGaussianChain(num_steps=6, last_std=last_std)
    generator = torch.Generator().manual_seed(0)
    for settings in EVERY_MODE:
        estimator = RLREstimator(settings)
        estimator.learn([book_of_blocks({2: 1.0, 4: 0.1})])
        if not _has_a_term(settings, differentiable):
            with pytest.raises(CoverageError, match="a term for this reward"):
                estimator.coverage(chain, differentiable)
            continue
        draws_blocks = settings.half_order is not None and settings.half_order.blocks != "all"
        layout, draws = estimator.layout(chain, differentiable), 100 if draws_blocks else 2
        weights = [_realised_weights(layout, settings.coefficients, generator) for _ in range(draws)]
        realised = torch.stack(weights)
        coverage = estimator.coverage(chain, differentiable)
        declared = coverage.weights
        tolerance = 6 * realised.std(0) / math.sqrt(draws) + 1e-9
        assert torch.all((realised.mean(0) - declared).abs() <= tolerance), settings
        off = {t for t, weight in enumerate(declared.tolist(), start=1) if abs(weight - 1) > 1e-9}
        assert set(coverage.gaps) == off, settings
        assert coverage.unbiased == (not off and coverage.smoothing is None)


def _realised_weights(layout: Layout, coefficients: Coefficients, generator: torch.Generator) -> torch.Tensor:
    weights = torch.zeros(6, dtype=torch.float64)
    weights[: layout.first_order_steps] += coefficients.first_order
    for t in layout.black_box_steps:
        weights[t - 1] += coefficients.half_order
    blocks, left = layout.draw(generator)
    for t in left:
        weights[t - 1] += coefficients.zeroth_order
    for block, weight in blocks:
        weights[block[0] - 1 : block[-1]] += weight
    return weights


def _has_a_term(settings: RLRSettings, differentiable: bool) -> bool:
    tail = settings.first_order_steps if differentiable else settings.black_box_steps
    return bool(tail or settings.half_order or settings.zeroth_order)


def test_a_chain_whose_only_step_ends_clean_says_that_score_terms_need_noise() -> None:
    """Score terms were asked for, so the advice to take an estimator that has some would lead nowhere."""
    chain = LinearGaussianChain(num_steps=1)
    for settings in (RLRSettings("auto", HalfOrder(1, "all")), RLRSettings(0, None, black_box_steps=1)):
        with pytest.raises(CoverageError, match=r"need noise, which no step has.*Raise eta or num_inference_steps"):
            RLREstimator(settings).layout(chain, False)
    with pytest.raises(CoverageError, match=r"no half-order or zeroth-order terms\. Use estimator rlr"):
        RLREstimator(RLRSettings(1, None)).layout(chain, False)


def test_a_mixture_is_complete_and_its_coefficients_count_by_their_shares() -> None:
    chain = LinearGaussianChain(num_steps=6)
    mixture = torch.tensor([1.0, 0.25, 0.0, 0.75], dtype=torch.float64)

    def layout(coefficients: Coefficients) -> Layout:
        settings = RLRSettings("auto", HalfOrder(1, "all"), coefficients=coefficients)
        return lay_out(settings, chain, first_order_steps=4, has_gradient=True, mixture=mixture)

    assert layout(Coefficients()).coverage.unbiased
    assert [block[0] for block in layout(Coefficients()).blocks] == [5, 6]
    weights = layout(Coefficients(first_order=3.0, half_order=2.0)).coverage.weights
    assert weights.tolist() == [3.0, 2.25, 2.0, 2.75, 2.0, 2.0]


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("perturbed", [None, ZerothOrder("two-point", 0.01)])
def test_a_window_that_the_tail_has_come_to_cover_is_drawn_from_no_more(
    differentiable: bool, perturbed: ZerothOrder | None
) -> None:
    """A measured K, or the black-box tail of a reward without gradient, may pass the window in mid-training."""
    chain = LinearGaussianChain(num_steps=6, last_std=0.2)
    settings = RLRSettings("auto", HalfOrder(1, 1, "window", (2, 3)), perturbed, black_box_steps=4)
    estimator = RLREstimator(settings)
    quiet, noisy = torch.full((6,), 1e-3), torch.ones(6)
    first_order, half_order = torch.cat([quiet[:4], noisy[4:]]), torch.cat([noisy[:4], quiet[4:]])
    estimator.statistics.variances = StepVariances(first_order, half_order, torch.ones(6, dtype=torch.bool))
    layout = estimator.layout(chain, differentiable)
    assert (layout.first_order_steps, layout.black_box_steps) == ((4, []) if differentiable else (0, [1, 2, 3, 4]))
    assert layout.blocks == []
    if perturbed is None:
        assert (
            layout.coverage.describe()
            == "The gradient is biased: steps 5-6 of 6 are left out, outside the chosen window."
        )
    else:
        assert layout.left == [5, 6] and layout.coverage.complete


def test_the_zeroth_order_takes_noiseless_steps_that_mirroring_cannot() -> None:
    estimator = RLREstimator(RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.01), black_box_steps=3))
    layout = estimator.layout(LinearGaussianChain(num_steps=6), False)
    assert layout.black_box_steps == [2, 3] and 1 in layout.left
    assert layout.coverage.complete


def test_a_tail_of_coefficient_0_is_not_left_to_the_zeroth_order() -> None:
    settings = RLRSettings(2, None, ZerothOrder("two-point", 0.01), coefficients=Coefficients(first_order=0.0))
    layout = RLREstimator(settings).layout(LinearGaussianChain(num_steps=6), True)
    assert layout.left == [3, 4, 5, 6]
    assert layout.coverage.weights.tolist() == [0, 0, 1, 1, 1, 1]


def test_coverage_is_checked_and_described() -> None:
    with pytest.raises(CoverageError, match=r"coverage 1 at step 2 of 3, got 0\.5"):
        Coverage(torch.tensor([1.0, 0.5, 1.0]), {}).check()
    gaps = Coverage(torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]), {2: "left out", 3: "left out", 5: "noiseless"})
    gaps.check()
    assert gaps.describe() == "The gradient is biased: steps 2-3 of 5 are left out; step 5 of 5 is noiseless."
    whole = Coverage(torch.ones(3), {})
    assert whole.unbiased and "unbiased" in whole.describe()
    smoothed = Coverage(torch.ones(3), {}, smoothing=0.5)
    assert smoothed.complete and not smoothed.unbiased
    assert "unbiased" not in smoothed.describe() and "smoothed at s = 0.5" in smoothed.describe()
    both = Coverage(torch.tensor([1.0, 0.5]), {2: "halved"}, smoothing=0.5, departures=("rewards are clipped",))
    assert both.describe() == (
        "The gradient is biased: rewards are clipped; the zeroth-order term estimates the gradient of the objective "
        "smoothed at s = 0.5, with a bias of order s squared; step 2 of 2 is halved."
    )
    departed = Coverage(torch.ones(3), {}, departures=("rewards are clipped", "so are ratios"))
    assert departed.complete and not departed.unbiased
    assert departed.describe() == "The gradient is biased: rewards are clipped; so are ratios."


def test_hot_steps_under_a_score_term_are_named() -> None:
    chain = LinearGaussianChain(last_std=0.01)  # gain .3 against a noise of .01
    estimator = RLREstimator(RLRSettings(0, HalfOrder(1, "all")))
    book = estimator.accumulate(chain, QuadraticReward(chain), *rollout_of(chain, 4, 4), torch.Generator())
    assert book.hot_steps == pytest.approx({1: 30.0})
