"""ReFL: the reward of the image that the denoiser predicts at one random late step, differentiated through that step.

It costs one replay, whatever T, but raises the reward of predictions, not of images (Xu et al., "ImageReward", 2023).
"""

import math
from collections.abc import Sequence

import torch

from rlr_peft.chain.adjoint import ReplayedStep, add_to_gradients
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.coverage import Coverage, CoverageError
from rlr_peft.estimators.estimator import EstimatorReport, StatelessEstimator
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.rollout import Rollout


class RewardFeedbackEstimator(StatelessEstimator):
    """Draws a step evenly from the last ones for every micro-batch.

    Args:
        last_steps: K, the step is one of 1..K; None for the last quarter of the chain.
    """

    uses_reward_gradient = True

    def __init__(self, last_steps: int | None = None) -> None:
        self.last_steps = last_steps

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards."""
        last = "quarter of the steps" if self.last_steps is None else f"{self.last_steps} step(s)"
        return f"reward of the image predicted at a random one of the last {last}"

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Leave-one-out advantages, for the logs; the gradient does not need them."""
        return leave_one_out(rewards, group_size)

    def accumulate(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> EstimatorReport:
        """Adds the gradient of the predicted images' summed reward to ``.grad``.

        Raises:
            CoverageError: the reward has no gradient.
        """
        if rollout.reward_gradient is None:
            raise CoverageError(
                "Expected a differentiable reward for refl, got one without gradient. Use --estimator rlr."
            )
        trajectory, count = rollout.trajectory, self.last_steps or math.ceil(chain.num_steps / 4)
        t = int(torch.randint(1, count + 1, (1,), generator=generator))
        _, cotangent = objective.score_with_gradient(trajectory.pred_original_samples[t - 1], trajectory.prompts)
        step = ReplayedStep(chain, trajectory, t, with_latents=False)
        gradients = step.into_parameters(cotangent, output=step.pred_original_sample)
        norm = add_to_gradients(chain, gradients) / trajectory.batch_size
        return EstimatorReport(
            coverage=Coverage(
                torch.zeros(chain.num_steps, dtype=torch.float64),
                {},
                departures=(f"the reward of the image predicted at one of steps 1-{count} stands in for the image's",),
            ),
            gradient_norms={"reward_feedback": norm},
            backward_steps=1,
        )
