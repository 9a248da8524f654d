"""ReFL against plain autograd of the reward of the predicted image."""

import pytest
import torch

from rlr_peft.estimators.base import CoverageError, Rollout
from rlr_peft.estimators.objective import DecodedReward
from rlr_peft.estimators.pathwise import RewardFeedbackEstimator
from rlr_peft.rewards.callables import CallableReward
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import adapted_chain, flat, gradient_of, move_parameters, rollout_of


def gradients_by_step(chain: LinearGaussianChain, rollout: Rollout) -> dict[int, torch.Tensor]:
    """The reward of the prediction at every step, differentiated through that step on the tape."""
    gradients = {}
    for t in range(1, chain.num_steps + 1):
        predicted = chain.replay(rollout.trajectory, t).pred_original_sample
        reward = QuadraticReward(chain).score(predicted, rollout.trajectory.prompts).sum()
        gradients[t] = flat(torch.autograd.grad(reward, chain.parameters))
    return gradients


@pytest.mark.parametrize(("last_steps", "expected"), [(1, {1}), (3, {1, 2, 3}), (None, {1, 2})])
def test_it_differentiates_the_reward_of_the_prediction_at_one_of_the_last_steps(
    last_steps: int | None, expected: set[int]
) -> None:
    """Without a number it is one of the last quarter, rounded up: 2 of 6."""
    chain = LinearGaussianChain(num_steps=6)
    rollout = rollout_of(chain, 8, 4)
    candidates = gradients_by_step(chain, rollout)
    drawn = []
    for seed in range(30):
        evaluations = chain.denoiser_evaluations
        RewardFeedbackEstimator(last_steps).accumulate(
            chain, QuadraticReward(chain), rollout, torch.Generator().manual_seed(seed)
        )
        assert chain.denoiser_evaluations == evaluations + 8, "it costs one replay"
        gradient = gradient_of(chain)
        drawn += [t for t, candidate in candidates.items() if torch.allclose(gradient, candidate, rtol=1e-9)]
    assert len(drawn) == 30 and set(drawn) == expected


def test_on_stable_diffusion_it_is_plain_autograd_through_denoiser_and_decoder() -> None:
    chain = adapted_chain(4)
    move_parameters(chain, 0.1)
    trajectory = chain.sample(["red", "blue b"], [0, 1])

    def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.square().mean((1, 2, 3))

    objective = DecodedReward(chain, CallableReward("brightness", brightness), 1)
    measured = objective.measure(trajectory.latents[0], trajectory.prompts)
    rollout = Rollout(trajectory, measured.scored.scores, measured.scored.scores, measured.reward_gradient)
    RewardFeedbackEstimator(1).accumulate(chain, objective, rollout, torch.Generator())
    actual = gradient_of(chain)
    predicted = chain.replay(trajectory, 1).pred_original_sample
    reward = brightness(chain.decode(predicted, trajectory.prompts), trajectory.prompts).sum()
    expected = flat(torch.autograd.grad(reward, chain.parameters))
    assert (actual - expected).norm() <= 1e-6 * expected.norm()  # the pixels are float32


def test_a_reward_without_gradient_is_refused() -> None:
    with pytest.raises(CoverageError, match="differentiable reward for refl"):
        RewardFeedbackEstimator().coverage(LinearGaussianChain(), has_gradient=False)
