"""Sampled batches: what belongs to which prompt, and mirrored noises."""

import pytest
import torch

from rlr_peft.chain import DenoisingChain
from rlr_peft.estimators import Batch, DecodedReward, leave_one_out, mirrored_pairs, sample_batch
from rlr_peft.rewards import CallableReward
from tests.pipelines import chain_over, tiny_stable_diffusion

PROMPTS = ["red"] * 4 + ["blue"] * 4


def sampled(micro_batch_size: int, antithetic: bool) -> tuple[DenoisingChain, Batch]:
    chain = chain_over(tiny_stable_diffusion(dtype=torch.float64), num_inference_steps=3, guidance_scale=3.0)
    reward = CallableReward("brightness", lambda images, prompts: images.mean((1, 2, 3)))
    objective = DecodedReward(chain, reward, 4)
    return chain, sample_batch(chain, objective, PROMPTS, list(range(8)), micro_batch_size, antithetic)


def test_mirrored_pairs_are_neighbours() -> None:
    noises = torch.randn(3, 2, 4)
    pairs = mirrored_pairs(noises)
    assert pairs.shape == (3, 4, 4)
    for i in range(2):
        assert torch.equal(pairs[:, 2 * i], noises[:, i]) and torch.equal(pairs[:, 2 * i + 1], -noises[:, i])


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_antithetic_samples_have_the_noises_of_the_first_seed_of_their_pair(micro_batch_size: int) -> None:
    chain, batch = sampled(micro_batch_size, antithetic=True)
    assert batch.prompts == PROMPTS and batch.scored.scores.shape == (8,)
    noises = torch.cat([trajectory.noises for trajectory, _ in batch.micro_batches], dim=1)
    assert torch.equal(noises[:, ::2], chain.draw_noises([0, 2, 4, 6]))
    assert torch.equal(noises[:, 1::2], -noises[:, ::2])
    advantages = leave_one_out(batch.scored.scores, 4, antithetic=True)
    parts = [rollout.advantages for rollout in batch.rollouts(advantages)]
    assert [len(part) for part in parts] == [micro_batch_size] * (8 // micro_batch_size)
    assert torch.equal(torch.cat(parts), advantages)


def test_the_size_of_a_micro_batch_changes_nothing() -> None:
    for antithetic in (False, True):
        (_, small), (_, large) = sampled(2, antithetic), sampled(8, antithetic)
        torch.testing.assert_close(small.scored.scores, large.scored.scores)
        parts = [measured.reward_gradient for _, measured in small.micro_batches]
        ((_, whole),) = large.micro_batches
        assert len(parts) == 4
        torch.testing.assert_close(torch.cat(parts), whole.reward_gradient)
