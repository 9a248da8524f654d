"""The roulette tail: its draws, its chances, and what its walk costs."""

import pytest
import torch

from rlr_peft.estimators import (
    SMALLEST_PROBABILITY,
    GradientMoments,
    HalfOrder,
    RLREstimator,
    RLRSettings,
    roulette_probabilities,
    roulette_weights,
)
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import gradient_of, rollout_of

CHANCES = torch.tensor([1.0, 0.5, 0.5, 0.1], dtype=torch.float64)


def test_every_sample_is_walked_a_stretch_from_the_clean_end_with_weights_of_mean_one() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([roulette_weights(CHANCES, 8, generator) for _ in range(4000)])
    walked = draws > 0
    assert bool((walked[:, :-1] >= walked[:, 1:]).all()), "no step without those before it"
    # each sample's weight has a standard deviation of at most 3; samples of a batch are correlated
    torch.testing.assert_close(draws.mean(0), torch.ones(4, 8, dtype=torch.float64), atol=6 * 3 / 4000**0.5, rtol=0)
    assert bool((walked[:, 1].sum(1) == 4).all()), "half of the batch, no more and no less"
    assert set(walked[:, 3].sum(1).tolist()) == {0, 1}


def judged(moments: GradientMoments, chances: torch.Tensor, samples: int) -> float:
    single = float((moments.products / torch.maximum(chances[:, None], chances[None])).sum())
    expected = float(moments.means.sum())
    return (expected + (single - expected) / samples) ** 0.5 * (3 + 3 * float(chances.sum()))


@pytest.mark.parametrize("samples", [1, 16])
def test_measured_chances_promise_the_most_per_cost(samples: int) -> None:
    """Against a search over all monotone chances on a grid; a larger batch bears more noise, so that it walks less."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
    mean = torch.randn(20, generator=generator, dtype=torch.float64)
    noises = torch.randn(3, 200, 20, generator=generator, dtype=torch.float64)
    moments = GradientMoments.of(sizes[:, None, None] * (mean + noises))
    grid = torch.linspace(SMALLEST_PROBABILITY, 1, 39, dtype=torch.float64).tolist()
    searched = [
        judged(moments, torch.tensor([1.0, b, c], dtype=torch.float64), samples) for b in grid for c in grid if c <= b
    ]
    chances = roulette_probabilities(moments, samples, fixed_cost=3)
    assert judged(moments, chances, samples) <= 1.005 * min(searched)
    assert chances[0] == 1 and bool((chances[:-1] >= chances[1:]).all())
    assert chances.sum() > roulette_probabilities(moments, 10 * samples, fixed_cost=3).sum()


def test_chances_stay_monotone_and_above_the_floor_where_gradients_grow_or_vanish() -> None:
    growing = torch.diag(torch.tensor([1.0, 4.0, 16.0, 0.0], dtype=torch.float64))
    chances = roulette_probabilities(GradientMoments(growing, growing), 1, fixed_cost=4)
    assert chances[0] == 1 and chances[1] == chances[2] > chances[3] == SMALLEST_PROBABILITY


def test_the_walk_costs_what_it_walks_and_the_book_says_so() -> None:
    chain = LinearGaussianChain(num_steps=6)
    rollout, advantages = rollout_of(chain, 16, 4)
    estimator = RLREstimator(RLRSettings(6, HalfOrder(1, "all"), roulette=True))
    with pytest.raises(RuntimeError, match="calibrate"):
        estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    assert estimator.wants_calibration(True)
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    expected = float(estimator.roulette(chain, 6).sum())
    chain.denoiser_evaluations = 0
    book = estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0))
    gradient_of(chain)
    assert book.first_order_steps == book.backward_passes == chain.denoiser_evaluations / 16
    assert abs(book.first_order_steps - expected) <= 6 / 16, "stratified: at most one sample more or less at every step"
    assert 1 < book.first_order_steps < 6


def test_what_was_measured_is_restored() -> None:
    chain = LinearGaussianChain(num_steps=4)
    rollout, advantages = rollout_of(chain, 16, 4)
    estimator = RLREstimator(RLRSettings("auto", HalfOrder(1, "all"), roulette=True))
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    restored = RLREstimator(estimator.settings)
    restored.load_state_dict(estimator.state_dict())
    for one in (estimator, restored):
        one.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0))
    both = gradient_of(chain)
    restored.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(0))
    torch.testing.assert_close(both, 2 * gradient_of(chain))


def test_a_chain_whose_samples_depend_on_their_batch_is_walked_in_full() -> None:
    """As with LoRA dropout, whose masks differ in a narrower batch."""
    chain = LinearGaussianChain(num_steps=4)
    chain.mixes_samples = True
    rollout, advantages = rollout_of(chain, 16, 4)
    estimator = RLREstimator(RLRSettings(4, HalfOrder(1, "all"), roulette=True))
    book = estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    assert book.first_order_steps == 4
