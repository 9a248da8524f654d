"""Black-box tail (FB): low-variance score terms next to the image for rewards without a gradient.

For each step t the sample is continued once more from ``x'_{t-1} = x_{t-1} - 2 sigma_t eps_t``, the mirror image of
its noise, with the same later noises. ``A = (R(x_0) - R(x'_0)) / 2`` then cancels all of the reward that step t did not
cause.
"""

import torch

from rlr_peft.chain.adjoint import Segment
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.rollout import Rollout


def black_box_segment(chain: Chain, objective: Objective, rollout: Rollout, t: int, weight: float = 1.0) -> Segment:
    """The single-step segment of step t; costs t - 1 extra denoiser evaluations and one reward per sample."""
    advantages = mirrored_advantages(chain, objective, rollout, t)
    return Segment(first_step=t, length=1, cotangent=rollout.score_cotangent(t, advantages), weight=weight)


def mirrored_advantages(chain: Chain, objective: Objective, rollout: Rollout, t: int) -> torch.Tensor:
    """``A = (R(x_0) - R(x'_0)) / 2`` of step t, (B,)."""
    trajectory = rollout.trajectory
    mirrored = trajectory.latents[t - 1] - 2 * trajectory.std(t) * trajectory.noise(t)
    mirrored_rewards = objective.score(chain.rollout(trajectory, t - 1, mirrored), trajectory.prompts)
    return (rollout.rewards - mirrored_rewards) / 2
