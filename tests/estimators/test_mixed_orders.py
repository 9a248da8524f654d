"""First and half order mixed in one walk, against plain autograd through the whole chain."""

from collections.abc import Callable

import pytest
import torch

from rlr_peft.chain import Chain, adjoint
from rlr_peft.estimators import DecodedReward, Rollout, mixed_segment
from rlr_peft.rewards import CallableReward
from rlr_peft.testing import LinearGaussianChain
from tests.estimators.chains import adapted_chain, flat, gradient_of, move_parameters, rollout_of


def linear() -> tuple[Chain, Rollout, torch.Tensor]:
    chain = LinearGaussianChain(num_steps=5)
    return chain, *rollout_of(chain, 8, 4)


def stable_diffusion() -> tuple[Chain, Rollout, torch.Tensor]:
    chain = adapted_chain(4)
    move_parameters(chain, 0.1)
    trajectory = chain.sample(["red", "blue b"], [0, 1])
    reward = CallableReward("brightness", lambda images, prompts: images.square().mean((1, 2, 3)))
    measured = DecodedReward(chain, reward, 2).measure(trajectory.latents[0], trajectory.prompts)
    rollout = Rollout(trajectory, measured.scored.scores, measured.reward_gradient)
    return chain, rollout, torch.tensor([0.7, -1.1])


def pathwise_by_autograd(chain: Chain, rollout: Rollout, length: int) -> list[torch.Tensor]:
    """Gradient through every step's use of the parameters, t = 1 first: one tape, the other steps' uses cut off."""
    trajectory = rollout.trajectory
    gradients = []
    for differentiated in range(1, length + 1):
        latents = trajectory.latents[differentiated].detach()
        for t in range(differentiated, 0, -1):
            for parameter in chain.parameters:
                parameter.requires_grad_(t == differentiated)
            latents = chain.replay(trajectory, t, latents).next_latents(trajectory.noise(t))
        for parameter in chain.parameters:
            parameter.requires_grad_(True)
        gradients.append(_gradient(chain, (latents * rollout.reward_gradient).sum()))
    return gradients


def scores_by_autograd(chain: Chain, rollout: Rollout, advantages: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Gradient of ``A log p(x_{t-1} | x_t)`` for every step with noise, 0 for others."""
    gradients = []
    for t in range(1, length + 1):
        std, step = chain.std(t), chain.replay(rollout.trajectory, t)
        if std == 0:
            gradients.append(torch.zeros_like(_gradient(chain, step.mean.sum())))
            continue
        log_density = torch.distributions.Normal(step.mean, std).log_prob(rollout.trajectory.latents[t - 1])
        weighted = log_density.flatten(1).sum(1) * advantages.to(log_density)
        gradients.append(_gradient(chain, weighted.sum()))
    return gradients


def _gradient(chain: Chain, value: torch.Tensor) -> torch.Tensor:
    return flat(torch.autograd.grad(value, chain.parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("build", [linear, stable_diffusion], ids=["linear chain", "Stable Diffusion"])
def test_the_mixed_segment_is_the_weighted_sum_of_both_terms(
    build: Callable[[], tuple[Chain, Rollout, torch.Tensor]],
) -> None:
    chain, rollout, advantages = build()
    mixture = torch.tensor([1.0, 0.3, 0.0, 0.8], dtype=torch.float64)
    pathwise = pathwise_by_autograd(chain, rollout, 4)
    scores = scores_by_autograd(chain, rollout, advantages, 4)
    for first_order, half_order in [(1.0, 1.0), (0.5, 3.0)]:
        booking = adjoint.run(
            chain, rollout.trajectory, mixed_segment(rollout, advantages, mixture, first_order, half_order)
        )
        expected = sum(
            first_order * share * pathwise[i] + half_order * (1 - share) * scores[i]
            for i, share in enumerate(mixture.tolist())
        )
        actual = gradient_of(chain)
        assert (actual - expected).norm() <= 1e-8 * expected.norm()
        assert booking.norm == pytest.approx(float(expected.norm()))


def test_a_mixture_of_ones_is_the_pathwise_gradient() -> None:
    chain, rollout, advantages = linear()
    adjoint.run(chain, rollout.trajectory, mixed_segment(rollout, advantages, torch.ones(5)))
    mixed = gradient_of(chain)
    adjoint.run(chain, rollout.trajectory, adjoint.Segment("first_order", range(1, 6), rollout.reward_gradient))
    torch.testing.assert_close(mixed, gradient_of(chain))


def test_pathwise_weight_on_every_noiseless_step_is_required() -> None:
    chain, rollout, advantages = linear()
    with pytest.raises(ValueError, match="Expected noise at step 1"):
        adjoint.run(chain, rollout.trajectory, mixed_segment(rollout, advantages, torch.tensor([0.5, 0.5])))
