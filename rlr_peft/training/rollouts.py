"""Samples and scores the batches of an update: prompts to chains to rewards to advantages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.estimators.objective import DecodedReward, Measurement
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.rewards.scores import Info, join_info


@dataclass(frozen=True)
class Batch:
    """The samples of one process for one update.

    Attributes:
        rollouts: its micro-batches.
        rewards: of all samples, (N,).
        heldout: held-out scores of all samples, (N,); None without a held-out reward.
        info: numbers of the reward beside its scores, name -> (N,).
        heldout_info: the same of the held-out reward.
    """

    rollouts: list[Rollout]
    rewards: torch.Tensor
    heldout: torch.Tensor | None
    info: Info = field(default_factory=dict)
    heldout_info: Info = field(default_factory=dict)


def sample_batch(
    chain: DenoisingChain,
    objective: DecodedReward,
    prompts: Sequence[str],
    seeds: Sequence[int],
    micro_batch_size: int,
    advantages: Callable[[torch.Tensor, list[str]], torch.Tensor],
    antithetic: bool = False,
    differentiate: bool = True,
) -> Batch:
    """Samples and scores every prompt, and compares the rewards.

    Args:
        chain: the chain to sample.
        objective: scores its clean latents.
        prompts: one per sample, those of a group side by side.
        seeds: one per sample.
        micro_batch_size: samples per trajectory.
        advantages: from all rewards (N,) and prompts to advantages (N,).
        antithetic: every second sample gets the mirrored noises of the one before.
        differentiate: whether the rewards' gradients are wanted.
    """
    measured: list[tuple[Trajectory, Measurement]] = []
    for start in range(0, len(prompts), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        noises = mirrored_pairs(chain.draw_noises(seeds[part][::2])) if antithetic else None
        trajectory = chain.sample(prompts[part], seeds[part], noises)
        measured.append((trajectory, objective.measure(trajectory.latents[0], trajectory.prompts, differentiate)))
    rewards = torch.cat([measurement.rewards for _, measurement in measured])
    rollouts = [
        Rollout(trajectory, measurement.rewards, advantage, measurement.reward_gradient)
        for (trajectory, measurement), advantage in zip(
            measured, advantages(rewards, list(prompts)).split(micro_batch_size), strict=True
        )
    ]
    heldout = [measurement.heldout for _, measurement in measured if measurement.heldout is not None]
    return Batch(
        rollouts,
        rewards,
        torch.cat(heldout) if heldout else None,
        join_info((measurement.info, len(measurement.rewards)) for _, measurement in measured),
        join_info((measurement.heldout_info, len(measurement.rewards)) for _, measurement in measured),
    )


def mirrored_pairs(noises: torch.Tensor) -> torch.Tensor:
    """Every sample's noises followed by their negatives: (T + 1, B, ...) becomes (T + 1, 2 B, ...)."""
    return torch.stack([noises, -noises], dim=2).flatten(1, 2)
