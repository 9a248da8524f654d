"""A sampled and scored batch: all that an estimator gets to see of one update."""

from dataclasses import dataclass

import torch

from rlr_peft.chain.trajectory import Trajectory


@dataclass(frozen=True)
class Rollout:
    """One micro-batch of samples with their rewards.

    Attributes:
        trajectory: the samples, batch size B.
        rewards: R(x_0) of every sample, (B,).
        advantages: rewards minus a baseline that does not depend on the sample, (B,).
        reward_gradient: dR/dx_0 of every sample, (B, ...); None for a reward without gradient.
    """

    trajectory: Trajectory
    rewards: torch.Tensor
    advantages: torch.Tensor
    reward_gradient: torch.Tensor | None

    def select(self, samples: list[int]) -> "Rollout":
        """The rollout of some of the samples."""
        return Rollout(
            trajectory=self.trajectory.select(samples),
            rewards=self.rewards[samples],
            advantages=self.advantages[samples],
            reward_gradient=None if self.reward_gradient is None else self.reward_gradient[samples],
        )

    def score_cotangent(self, t: int, advantages: torch.Tensor | None = None) -> torch.Tensor:
        """``A eps_t / sigma_t``, the cotangent at the mean of step t of a score-function term, (B, ...).

        Args:
            t: the step.
            advantages: A, (B,); the rollout's own if None.

        Raises:
            ValueError: step t is deterministic, so that it has no likelihood ratio.
        """
        std = self.trajectory.std(t)
        if std == 0:
            raise ValueError(f"Expected noise at step {t}, got std = 0: a score-function term is undefined there.")
        advantages = self.advantages if advantages is None else advantages
        return per_sample(advantages, self.trajectory.noise(t)) * self.trajectory.noise(t) / std


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshapes (B,) so that it multiplies (B, ...) sample by sample."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
