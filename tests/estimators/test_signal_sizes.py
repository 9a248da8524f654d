"""What past updates say about the variance of every step's terms."""

import pytest
import torch

from benchmarks.guided_mixture import GuidedMixtureChain, WaveReward
from rlr_peft.chain import adjoint
from rlr_peft.estimators import (
    HalfOrder,
    RLREstimator,
    RLRSettings,
    SignalSizes,
    StepGains,
    StepVariances,
    mixed_segment,
)
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import gradient_of, rollout_of


@pytest.mark.parametrize("mixed", [False, True], ids=["first order", "mixed orders"])
def test_a_walk_books_the_squares_of_its_cotangents(mixed: bool) -> None:
    chain = LinearGaussianChain(num_steps=4)
    rollout, advantages = rollout_of(chain, 8, 4)
    mixture = torch.tensor([1.0, 0.5, 0.25])
    segment = (
        mixed_segment(rollout, advantages, mixture)
        if mixed
        else adjoint.Segment("first_order", (1, 2, 3), rollout.reward_gradient)
    )
    booking = adjoint.run(chain, rollout.trajectory, segment)
    assert rollout.reward_gradient is not None
    cotangent, expected = rollout.reward_gradient, []
    for t in range(1, 4):
        expected.append(float(cotangent.square().sum()))
        latents = rollout.trajectory.latents[t].clone().requires_grad_()
        (cotangent,) = torch.autograd.grad(chain.replay(rollout.trajectory, t, latents).mean, latents, cotangent)
    assert booking.cotangent_squares == pytest.approx(expected)


def test_cotangents_are_the_rewards_slope_times_the_amplification_of_those_that_were_walked() -> None:
    walks = [SignalSizes.of_walk(torch.tensor([1.0, -1.0]), [1.0, 6.0, 40.0])]
    walks.append(SignalSizes.of_walk(torch.tensor([2.0, -2.0]), [3.0, 10.0]))
    sizes = SignalSizes().blend(walks, decay=0.5)
    assert sizes.mean_squared_advantage() == 10 / 4
    cotangents = sizes.mean_squared_cotangents()
    # E |c_1|^2 = 4 / 4; amplification (6 + 10) / (1 + 3) at step 2, and 40 / 1 by the one walk that went to step 3
    assert cotangents.tolist() == [1, 4, 40], "of later steps nothing is known"
    sizes = sizes.blend([SignalSizes.of_walk(torch.zeros(2), [10.0, 20.0])], decay=0.5)
    # the past counts half: E |c_1|^2 = (2 + 10) / (2 + 2), amplification (8 + 20) / (2 + 10)
    assert sizes.mean_squared_cotangents().tolist() == pytest.approx([3, 3 * 28 / 12, 3 * 40])
    assert sizes.mean_squared_advantage() == 5 / 4


def test_variances_are_gains_times_sizes() -> None:
    gains = StepGains(
        scores=torch.tensor([0.0, 5.0, 7.0]),
        has_noise=torch.tensor([False, True, True]),
        first_order=torch.tensor([2.0, 12.0, 0.0]),
        cotangents=torch.tensor([1.0, 3.0, 0.0]),
    )
    seen = SignalSizes.of_walk(torch.tensor([2.0, 0.0]), [4.0, 20.0, 8.0])
    variances = gains.variances(seen)
    assert variances.first_order.tolist() == [4, 40, 0]  # gains 2 and 4, cotangents 2 and 10; none measured at step 3
    assert variances.half_order[1:].tolist() == [10, 14] and variances.has_noise.tolist() == [False, True, True]


def test_rewards_that_are_all_the_same_in_a_calibration_do_not_make_score_terms_quiet() -> None:
    """Its advantages are zero, and so was the measured variance; the updates before know better."""
    noise = torch.tensor([False, True])
    gains = StepGains(torch.tensor([0.0, 9.0]), noise, torch.tensor([2.0, 1.5]), torch.tensor([1.0, 1.0]))
    past = SignalSizes.of_walk(torch.tensor([1.0, -1.0]), [1.0, 1.0])
    nothing = SignalSizes.of_walk(torch.zeros(2), [1e-15, 1e-15])
    assert gains.variances(nothing).half_order[1] == 0
    assert gains.variances(past.blend([nothing], decay=0.99)).half_order[1] > 4


def test_a_chain_without_pathwise_steps_still_sees_the_rewards_slope() -> None:
    chain = LinearGaussianChain(num_steps=3, last_std=0.2)
    rollout, advantages = rollout_of(chain, 8, 4)
    estimator = RLREstimator(RLRSettings("auto", HalfOrder(1, "all")))
    quiet, noisy = torch.full((3,), 1e-9, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    estimator.statistics.variances = StepVariances(noisy, quiet, torch.ones(3, dtype=torch.bool))
    book = estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    assert book.first_order_steps == 0
    assert SignalSizes.of_book(book).cotangents == [pytest.approx(float(rollout.reward_gradient.square().sum()))]


def test_updates_reveal_the_heavy_tail_that_a_calibration_missed() -> None:
    """Rare samples make up the variance of early pathwise gradients; the calibration's 16 hold none."""
    chain = GuidedMixtureChain(20, width=0.8)
    objective, generator = WaveReward(chain), torch.Generator()
    estimator = RLREstimator(RLRSettings("auto", HalfOrder(1, "all")))
    rollout, advantages = rollout_of(chain, 16, 4, seed=3, objective=objective)
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    before = estimator.layout(chain, True).first_order_steps
    for update in range(8):
        rollout, advantages = rollout_of(chain, 128, 4, seed=1000 * (update + 1), objective=objective)
        estimator.learn([estimator.accumulate(chain, objective, rollout, advantages, generator)])
    after = estimator.layout(chain, True).first_order_steps
    assert after < before
    many = GuidedMixtureChain(20, width=0.8, replicates=2000)
    rollout, advantages = rollout_of(many, 8000, 4, seed=77, objective=objective)
    variances = {}
    for k in (after, before):
        RLREstimator(RLRSettings(k, HalfOrder(1, "all"))).accumulate(many, objective, rollout, advantages, generator)
        variances[k] = float(gradient_of(many).reshape(2000, -1).var(0).sum())
    assert variances[after] < 0.5 * variances[before]
