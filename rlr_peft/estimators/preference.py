"""D3PO: direct preference optimisation of the chain's steps, on pairs of samples of the same prompt.

Of two samples the one with the higher reward is preferred. Every step then raises
``log sigmoid(beta (log p / p_ref (preferred) - log p / p_ref (other)))``, the reference being the base model. Only the
order of the rewards counts (Yang et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
CVPR 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlr_peft.chain.adjoint import ReplayedStep, add_to_gradients
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.coverage import Coverage
from rlr_peft.estimators.estimator import EstimatorReport, StatelessEstimator
from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.hot_steps import hot_steps
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.policy_gradient import plan_steps, standardized_noise
from rlr_peft.estimators.rollout import Rollout, per_sample


@dataclass(frozen=True)
class PreferenceSettings:
    """How preferences are turned into gradients.

    Attributes:
        beta: strength of the pull towards the reference; small values follow the preferences further.
        steps: which steps train, all or some drawn for every micro-batch; single steps.
        inner_epochs: optimiser steps on the same pairs.
    """

    beta: float
    steps: HalfOrder
    inner_epochs: int = 1


class PreferenceEstimator(StatelessEstimator):
    """Trains on neighbouring samples as pairs; a prompt's samples must be an even number, side by side."""

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings
        self.inner_epochs = settings.inner_epochs

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards."""
        s = self.settings
        steps = "all steps" if s.steps.blocks == "all" else f"{s.steps.blocks} drawn step(s)"
        return (
            f"direct preference optimisation of pairs on {steps}, beta {s.beta:g}, {s.inner_epochs} inner epoch(s), "
            "the base as reference"
        )

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Leave-one-out advantages, for the logs; the gradient needs the order of the rewards alone."""
        return leave_one_out(rewards, group_size)

    def accumulate(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> EstimatorReport:
        """Adds the gradient of the preferences' log likelihood, summed over pairs, to ``.grad``."""
        plan = plan_steps(self.settings.steps, chain, generator)
        norm, accuracies = 0.0, []
        for block, weight in plan.blocks:
            t = block.first_step
            reference_mean = chain.reference_mean(rollout.trajectory, t)
            step = ReplayedStep(chain, rollout.trajectory, t, with_latents=False)
            cotangent, margin = preference_cotangent(rollout, t, step.mean.detach(), reference_mean, self.settings.beta)
            norm += add_to_gradients(chain, step.into_parameters(weight * cotangent))
            accuracies.append(float((margin > 0).double().mean()))
        return EstimatorReport(
            coverage=Coverage(
                plan.coverage.weights,
                plan.coverage.gaps,
                departures=("the likelihood of pairwise preferences is raised, not the expected reward",),
            ),
            gradient_norms={"preference": norm / rollout.trajectory.batch_size},
            backward_steps=len(plan.blocks),
            hot_steps=hot_steps(chain, plan),
            metrics={"preference_accuracy": sum(accuracies) / len(accuracies)},
        )


def preference_cotangent(
    rollout: Rollout, t: int, mean: torch.Tensor, reference_mean: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivative of the pairs' log likelihood by the present mean of step t.

    Args:
        rollout: samples 2i and 2i + 1 are a pair; equal rewards prefer neither and give nothing.
        t: a step with noise.
        mean: of step t under the present weights, (B, ...).
        reference_mean: under the reference's, (B, ...).
        beta: strength of the pull towards the reference.

    Returns:
        The cotangent (B, ...), and each pair's margin ``log p / p_ref (preferred) - log p / p_ref (other)``, (B / 2,).
    """
    noise = standardized_noise(rollout.trajectory, t, mean)
    reference_noise = standardized_noise(rollout.trajectory, t, reference_mean)
    log_ratio = (reference_noise.square() - noise.square()).flatten(1).sum(1) / 2
    first, second = rollout.rewards.reshape(-1, 2).to(log_ratio.dtype).T
    preference = torch.sign(first - second)
    margin = preference * (log_ratio[0::2] - log_ratio[1::2])
    slope = preference * beta * torch.sigmoid(-beta * margin)
    factor = torch.stack([slope, -slope], dim=1).reshape(-1)
    return per_sample(factor, noise) * noise / rollout.trajectory.std(t), margin
