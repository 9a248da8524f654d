"""Samples and scores the micro-batches of an update: prompts to chains to rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rlr_peft.chain.interface import Chain, Trajectory
from rlr_peft.estimators.base import Rollout
from rlr_peft.estimators.objective import DecodedReward, Measurement
from rlr_peft.prompt import Prompt, texts_of
from rlr_peft.rewards.base import Scored, join_scored


@dataclass(frozen=True)
class Batch:
    """The scored samples of one process for one update.

    Attributes:
        micro_batches: the samples and what they scored.
    """

    micro_batches: list[tuple[Trajectory, Measurement]]

    @property
    def prompts(self) -> list[str]:
        """The texts of all samples, (N,)."""
        return [text for trajectory, _ in self.micro_batches for text in texts_of(trajectory.prompts)]

    @cached_property
    def scored(self) -> Scored:
        """All samples, by the reward."""
        return join_scored([measured.scored for _, measured in self.micro_batches])

    @cached_property
    def rewards(self) -> torch.Tensor:
        """What is raised of all samples, (N,)."""
        return torch.cat([measured.rewards for _, measured in self.micro_batches])

    @cached_property
    def heldout(self) -> Scored | None:
        """The same by the held-out reward; None without one."""
        parts = [measured.heldout for _, measured in self.micro_batches if measured.heldout is not None]
        return join_scored(parts) if parts else None

    def rollouts(self, advantages: torch.Tensor) -> list[Rollout]:
        """What an estimator gets to see, given the advantages of all samples, (N,)."""
        parts = advantages.split([len(measured.rewards) for _, measured in self.micro_batches])
        return [
            Rollout(trajectory, measured.rewards, part, measured.reward_gradient)
            for (trajectory, measured), part in zip(self.micro_batches, parts, strict=True)
        ]


def sample_batch(
    chain: Chain,
    objective: DecodedReward,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    micro_batch_size: int,
    antithetic: bool = False,
    differentiate: bool = True,
) -> Batch:
    """Samples and scores every prompt.

    Args:
        chain: the chain to sample.
        objective: scores its clean latents.
        prompts: one per sample, those of a group side by side.
        seeds: one per sample.
        micro_batch_size: samples per trajectory.
        antithetic: every second sample gets the mirrored noises of the one before.
        differentiate: whether the rewards' gradients are wanted.
    """
    micro_batches = []
    for start in range(0, len(prompts), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        noises = mirrored_pairs(chain.draw_noises(seeds[part][::2])) if antithetic else None
        trajectory = chain.sample(prompts[part], seeds[part], noises)
        measured = objective.measure(trajectory.latents[0], trajectory.prompts, differentiate)
        micro_batches.append((trajectory, measured))
    return Batch(micro_batches)


def mirrored_pairs(noises: torch.Tensor) -> torch.Tensor:
    """Every sample's noises followed by their negatives: (T + 1, B, ...) becomes (T + 1, 2 B, ...)."""
    return torch.stack([noises, -noises], dim=2).flatten(1, 2)
