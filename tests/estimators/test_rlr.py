"""What the RLR estimator remembers between updates, and what it books."""

from dataclasses import replace

import pytest
import torch

from rlr_peft.estimators import (
    NORM_DECAY,
    Book,
    Coefficients,
    HalfOrder,
    RLREstimator,
    RLRSettings,
    StepGains,
    StepVariances,
)
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import book_of_blocks, gradient_of, rollout_of

SINGLE = HalfOrder(1, "all")


def block_norms(book: Book) -> dict[int, float]:
    """What an estimator learns of the book alone: the norms of its half-order blocks by first step."""
    estimator = RLREstimator(RLRSettings())
    estimator.learn([book])
    return estimator.statistics.block_norms


def test_block_norms_of_all_micro_batches_make_one_running_mean() -> None:
    estimator = RLREstimator(RLRSettings())
    estimator.learn([book_of_blocks({2: 1.0}), book_of_blocks({2: 3.0, 4: 5.0})])
    estimator.learn([book_of_blocks({2: 4.0})])
    assert estimator.state_dict()["block_norms"] == {2: pytest.approx(NORM_DECAY * 2 + (1 - NORM_DECAY) * 4), 4: 5.0}


def test_remembered_norms_are_of_unweighted_blocks() -> None:
    """A block's own gradient decides how often it is drawn; its weight 1 / q or a coefficient must not."""
    chain = LinearGaussianChain(num_steps=4)
    rollout, advantages = rollout_of(chain, 8, 4)
    all_of_them = RLREstimator(RLRSettings(1, SINGLE))
    norms = block_norms(all_of_them.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator()))
    assert set(norms) == {2, 3, 4}
    drawn = RLREstimator(RLRSettings(1, HalfOrder(1, 1), coefficients=Coefficients(half_order=0.1)))
    ((t, norm),) = block_norms(
        drawn.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    ).items()
    assert norm == pytest.approx(norms[t])


def test_the_terms_norms_and_passes_are_booked() -> None:
    chain = LinearGaussianChain(num_steps=4)
    rollout, advantages = rollout_of(chain, 8, 4)
    book = RLREstimator(RLRSettings(2, SINGLE)).accumulate(
        chain, QuadraticReward(chain), rollout, advantages, torch.Generator()
    )
    assert book.first_order_steps == 2 and book.backward_passes == 4
    assert set(book.norms()) == {"first_order", "half_order"}
    gradient_of(chain)
    RLREstimator(RLRSettings(2, None)).accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    assert book.norms()["first_order"] == pytest.approx(float(gradient_of(chain).norm()) / 8)
    mixed = RLREstimator(RLRSettings("auto", SINGLE, step_choice="inverse-variance"))
    has_noise = torch.tensor([False, True, True, True])
    mixed.statistics.variances = StepVariances(torch.ones(4), torch.tensor([0, 1, 1, 1e-9]), has_noise)
    book = mixed.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    # one pass for step 1, which has weight 1, two for step 2, one for the last of the walk, and step 4's score term
    assert book.first_order_steps == 3 and book.backward_passes == 1 + 2 + 1 + 1
    assert set(book.norms()) == {"mixed_order", "half_order"}
    mixed.settings = replace(mixed.settings, coefficients=Coefficients(first_order=0.5))
    book = mixed.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    assert book.backward_passes == 2 + 2 + 1 + 1, "a coefficient makes step 1's cotangent another one too"


def quiet_scores(num_steps: int) -> StepGains:
    ones = torch.ones(num_steps, dtype=torch.float64)
    has_noise = torch.arange(num_steps) > 0
    return StepGains(torch.full_like(ones, 1e-9), has_noise, first_order=ones, cotangents=ones)


def test_auto_needs_a_calibration() -> None:
    with pytest.raises(RuntimeError, match="calibrate"):
        RLREstimator(RLRSettings("auto")).layout(LinearGaussianChain(), True)


def test_the_state_survives_a_round_trip(tmp_path) -> None:
    chain = LinearGaussianChain(num_steps=4)
    settings = RLRSettings("auto", HalfOrder(1, 2, "gradient-norm"), state_baseline=True)
    estimator = RLREstimator(settings)
    objective = QuadraticReward(chain)
    rollout, advantages = rollout_of(chain, 16, 4)
    estimator.calibrate(chain, [rollout], advantages, decay=0.5)
    # quiet score terms and so K = 1: blocks are drawn, and states give a baseline
    estimator.load_state_dict(estimator.state_dict() | {"gains": vars(quiet_scores(4))})
    for seed in range(2):
        estimator.learn([estimator.accumulate(chain, objective, *rollout_of(chain, 8, 4, seed), torch.Generator())])
    torch.save(estimator.state_dict(), tmp_path / "state.pt")
    restored = RLREstimator(settings)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert str(restored.state_dict()) == str(estimator.state_dict())
    gradients = []
    for each in (estimator, restored):
        gradient_of(chain)
        each.accumulate(chain, objective, *rollout_of(chain, 8, 4, 7), torch.Generator().manual_seed(1))
        gradients.append(gradient_of(chain))
    assert torch.equal(*gradients)
    fresh = RLREstimator(settings)
    fresh.statistics.variances = estimator.statistics.variances
    fresh.accumulate(chain, objective, *rollout_of(chain, 8, 4, 7), torch.Generator().manual_seed(1))
    assert not torch.equal(gradient_of(chain), gradients[0]), "what is remembered must matter"
