"""D3PO against plain autograd of the preferences' log likelihood."""

from dataclasses import replace

import pytest
import torch

from rlr_peft.config import D3POArguments
from rlr_peft.estimators import (
    HalfOrder,
    PreferenceEstimator,
    Rollout,
    RunShape,
    preference_cotangent,
    reference_mean,
    single_steps,
)
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import adapted_chain, flat, gradient_of, move_parameters, rollout_of

SINGLE = HalfOrder(1, "all")
BETA = 0.3


def preference(**knobs) -> PreferenceEstimator:
    return PreferenceEstimator(D3POArguments(dpo_beta=BETA, **knobs), RunShape(4))


def log_likelihood(chain, rollout: Rollout, t: int, mean: torch.Tensor) -> torch.Tensor:
    """Sum of ``log sigmoid(beta * margin)`` over the pairs whose rewards differ, by torch.distributions."""
    taken, std = rollout.trajectory.latents[t - 1], rollout.trajectory.std(t)
    reference = torch.distributions.Normal(reference_mean(chain, rollout.trajectory, t), std).log_prob(taken)
    log_ratio = (torch.distributions.Normal(mean, std).log_prob(taken) - reference).flatten(1).sum(1)
    total = torch.zeros((), dtype=mean.dtype)
    for i in range(0, len(rollout.rewards), 2):
        first, second = rollout.rewards[i], rollout.rewards[i + 1]
        if first != second:
            preferred, other = (i, i + 1) if first > second else (i + 1, i)
            total = total + torch.nn.functional.logsigmoid(BETA * (log_ratio[preferred] - log_ratio[other]))
    return total


def moved_chain(num_steps: int = 4) -> tuple[LinearGaussianChain, Rollout, torch.Tensor]:
    """A chain away from its reference, and samples of it; one pair has equal rewards."""
    chain = LinearGaussianChain(num_steps=num_steps)
    move_parameters(chain, 0.1)
    rollout, advantages = rollout_of(chain, 8, 4)
    rewards = rollout.rewards.clone()
    rewards[3] = rewards[2]
    return chain, replace(rollout, rewards=rewards), advantages


def test_the_cotangent_is_the_derivative_of_the_log_likelihood() -> None:
    chain, rollout, _ = moved_chain()
    for t in (2, 3, 4):
        mean = chain.replay(rollout.trajectory, t).mean.detach().requires_grad_()
        (expected,) = torch.autograd.grad(log_likelihood(chain, rollout, t, mean), mean)
        reference = reference_mean(chain, rollout.trajectory, t)
        cotangent, numbers = preference_cotangent(rollout, t, mean.detach(), of_reference=reference, beta=BETA)
        torch.testing.assert_close(cotangent, expected, rtol=1e-9, atol=1e-12)
        assert torch.all(cotangent[2:4] == 0), "equal rewards prefer neither"
        assert numbers["preference_accuracy"] <= 0.75, "nor does their pair count"
        assert torch.all(cotangent[[0, 1, 4, 5, 6, 7]] != 0)


def test_the_estimate_is_the_gradient_by_the_parameters() -> None:
    chain, rollout, advantages = moved_chain()
    total = sum(log_likelihood(chain, rollout, t, chain.replay(rollout.trajectory, t).mean) for t in (2, 3, 4))
    expected = flat(torch.autograd.grad(total, chain.parameters))
    estimator = preference()
    book = estimator.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    torch.testing.assert_close(gradient_of(chain), expected, rtol=1e-9, atol=1e-12)
    assert 0 < book.numbers()["preference_accuracy"] < 1

    by_step = {}
    drawn = preference(ho_blocks=1)
    for seed in range(20):
        ((block, _),) = single_steps(drawn.steps, chain).draw(torch.Generator().manual_seed(seed))[0]
        drawn.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(seed))
        by_step[block[0]] = gradient_of(chain)
    assert set(by_step) == {2, 3, 4}
    torch.testing.assert_close(torch.stack(list(by_step.values())).mean(0), expected)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_only_the_order_of_the_rewards_counts(scale: float) -> None:
    chain, rollout, advantages = moved_chain()
    estimator = preference()
    gradients = []
    for rewards in (rollout.rewards, scale * rollout.rewards.exp()):
        scaled = replace(rollout, rewards=rewards)
        estimator.accumulate(chain, QuadraticReward(chain), scaled, scale * advantages, torch.Generator())
        gradients.append(gradient_of(chain))
    assert torch.equal(*gradients)


def test_at_the_reference_no_pair_has_a_margin_and_a_step_along_the_gradient_gives_it_one() -> None:
    chain = adapted_chain(3)
    trajectory = chain.sample(["red", "red", "blue b", "blue b"], [0, 1, 2, 3])
    rollout, advantages = Rollout(trajectory, torch.tensor([1.0, 0.0, 0.0, 2.0]), None), torch.zeros(4)
    estimator = preference()
    for t in (2, 3):
        mean = chain.replay(trajectory, t).mean.detach()
        reference = reference_mean(chain, trajectory, t)
        _, numbers = preference_cotangent(rollout, t, mean, of_reference=reference, beta=BETA)
        assert numbers["preference_accuracy"] == 0
    book = estimator.accumulate(chain, None, rollout, advantages, torch.Generator())
    assert book.numbers()["preference_accuracy"] == 0
    with torch.no_grad():
        for parameter in chain.parameters:
            parameter.add_(1e-4 * parameter.grad)
            parameter.grad = None
    book = estimator.accumulate(chain, None, rollout, advantages, torch.Generator())
    assert book.numbers()["preference_accuracy"] > 0.5
