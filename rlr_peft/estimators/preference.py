"""D3PO: direct preference optimisation of the chain's steps, on pairs of samples of the same prompt.

Of two samples the one with the higher reward is preferred. Every step then raises
``log sigmoid(beta (log p / p_ref (preferred) - log p / p_ref (other)))``, the reference being the base model. Only the
order of the rewards counts (Yang et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
CVPR 2024).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from rlr_peft.chain.adjoint import Segment, per_sample
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.base import Coverage, Estimator, Rollout
from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.policy import single_steps, standardized_noise


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


class PreferenceEstimator(Estimator):
    """Trains on neighbouring samples as pairs; a prompt's samples must be an even number, side by side.

    Advantages are for the logs: the gradient needs the order of the rewards alone.
    """

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

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """All steps with noise, or those that are drawn."""
        departures = ("the likelihood of pairwise preferences is raised, not the expected reward",)
        return replace(single_steps(self.settings.steps, chain).coverage, departures=departures)

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> Iterator[Segment]:
        """The gradient of the preferences' log likelihood, summed over pairs, step by step."""
        blocks, _ = single_steps(self.settings.steps, chain).draw(generator)
        for block, weight in blocks:
            t = block.first_step
            reference_mean = chain.reference_mean(rollout.trajectory, t)
            pull = partial(preference_cotangent, rollout, reference_mean=reference_mean, beta=self.settings.beta)
            yield Segment("preference", (t,), None, weight, into_parameters=pull, score_steps=(t,))


def preference_cotangent(
    rollout: Rollout,
    t: int,
    mean: torch.Tensor,
    _: torch.Tensor | None = None,
    *,
    reference_mean: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Derivative of the pairs' log likelihood by the present mean of step t.

    Args:
        rollout: samples 2i and 2i + 1 are a pair; equal rewards prefer neither and give nothing.
        t: a step with noise.
        mean: of step t under the present weights, (B, ...).
        reference_mean: under the reference's, (B, ...).
        beta: strength of the pull towards the reference.

    Returns:
        The cotangent (B, ...); and for the logs the share of pairs whose margin ``log p / p_ref (preferred) -
        log p / p_ref (other)`` is positive.
    """
    noise = standardized_noise(rollout.trajectory, t, mean)
    reference_noise = standardized_noise(rollout.trajectory, t, reference_mean)
    log_ratio = (reference_noise.square() - noise.square()).flatten(1).sum(1) / 2
    first, second = rollout.rewards.reshape(-1, 2).to(log_ratio.dtype).T
    preference = torch.sign(first - second)
    margin = preference * (log_ratio[0::2] - log_ratio[1::2])
    slope = preference * beta * torch.sigmoid(-beta * margin)
    factor = torch.stack([slope, -slope], dim=1).reshape(-1)
    numbers = {"preference_accuracy": float((margin > 0).double().mean())}
    return per_sample(factor, noise) * noise / rollout.trajectory.std(t), numbers
