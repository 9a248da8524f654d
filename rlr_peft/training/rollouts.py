"""Samples and scores the batches of an update: prompts to chains to rewards to advantages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.objective import DecodedReward, Measurement
from rlr_peft.estimators.rollout import Rollout


@dataclass(frozen=True)
class Batch:
    """The samples of one process for one update.

    Attributes:
        rollouts: its micro-batches.
        rewards: of all samples, (N,).
        heldout: held-out scores of all samples, (N,); None without a held-out reward.
    """

    rollouts: list[Rollout]
    rewards: torch.Tensor
    heldout: torch.Tensor | None


def sample_batch(
    chain: DenoisingChain,
    objective: DecodedReward,
    prompts: Sequence[str],
    seeds: Sequence[int],
    micro_batch_size: int,
    group_size: int,
) -> Batch:
    """Samples every prompt ``group_size`` times, scores the images and compares them within their group.

    Args:
        chain: the chain to sample.
        objective: scores its clean latents.
        prompts: P prompts.
        seeds: P * group_size seeds, those of one prompt side by side.
        micro_batch_size: samples per trajectory.
        group_size: samples per prompt.
    """
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    measured: list[tuple[Trajectory, Measurement]] = []
    for start in range(0, len(repeated), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        trajectory = chain.sample(repeated[part], seeds[part])
        measured.append((trajectory, objective.measure(trajectory.latents[0], trajectory.prompts)))
    rewards = torch.cat([measurement.rewards for _, measurement in measured])
    advantages = leave_one_out(rewards, group_size).split(micro_batch_size)
    rollouts = [
        Rollout(trajectory, measurement.rewards, advantage, measurement.reward_gradient)
        for (trajectory, measurement), advantage in zip(measured, advantages, strict=True)
    ]
    heldout = [measurement.heldout for _, measurement in measured if measurement.heldout is not None]
    return Batch(rollouts, rewards, torch.cat(heldout) if heldout else None)
