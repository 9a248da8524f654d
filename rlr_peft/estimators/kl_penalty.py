"""Divergence from the base: the KL of every step in closed form, as a number and as a gradient.

Both steps are Gaussians of the same std, so ``KL_t = |mu_t - mu_ref,t|^2 / (2 sigma_t^2)``, and their sum over t is the
KL of the whole path. The gradient holds the visited states fixed, as Flow-GRPO's does.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from rlr_peft.chain.adjoint import ReplayedStep, add_to_gradients
from rlr_peft.chain.interface import Chain
from rlr_peft.errors import UserError
from rlr_peft.estimators.half_order import Block, HalfOrder, draw, draw_probabilities, expected_draws
from rlr_peft.estimators.rollout import Rollout


class NoDivergenceError(UserError, ValueError):
    """A chain without noise, whose paths have no density."""


@dataclass(frozen=True)
class KLPenalty:
    """How the divergence is measured and penalised.

    Attributes:
        beta: the objective is ``R - beta KL`` per sample; 0 only measures.
        steps: number of steps drawn, with weight 1 / q, or "all".
    """

    beta: float
    steps: int | Literal["all"]


def accumulate_kl_penalty(
    chain: Chain, rollout: Rollout, penalty: KLPenalty, generator: torch.Generator
) -> torch.Tensor:
    """Adds the gradient of ``-beta`` times the samples' summed KL to ``.grad``; returns the samples' KL, (B,).

    Raises:
        NoDivergenceError: no step of the chain has noise.
    """
    trajectory = rollout.trajectory
    blocks = [Block(t, 1) for t in range(1, chain.num_steps + 1) if chain.std(t) > 0]
    if not blocks:
        raise NoDivergenceError(
            f"Expected noise in the chain, without which the divergence from the base is not defined, got none in its "
            f"{chain.num_steps} step(s). Raise eta or num_inference_steps, or drop the divergence."
        )
    count = len(blocks) if penalty.steps == "all" else penalty.steps
    probabilities = draw_probabilities(blocks, HalfOrder(1, count), {})
    expectations = expected_draws(probabilities, count).tolist()
    divergence = torch.zeros(trajectory.batch_size, device=trajectory.latents.device, dtype=trajectory.latents.dtype)
    for i in draw(probabilities, count, generator):
        t, weight = blocks[i].first_step, 1 / expectations[i]
        reference_mean = chain.reference_mean(trajectory, t)
        if penalty.beta > 0:
            step = ReplayedStep(chain, trajectory, t, with_latents=False)
            mean = step.mean.detach()
            cotangent = -penalty.beta * weight * (mean - reference_mean) / chain.std(t) ** 2
            add_to_gradients(chain, step.into_parameters(cotangent))
        else:
            mean = present_mean(rollout, t)
        divergence += weight * step_kl(mean, reference_mean, chain.std(t))
    return divergence


def step_kl(mean: torch.Tensor, reference_mean: torch.Tensor, std: float) -> torch.Tensor:
    """KL of two Gaussian steps of the same std, summed over latent dimensions, (B,)."""
    return (mean - reference_mean).square().flatten(1).sum(1) / (2 * std**2)


def present_mean(rollout: Rollout, t: int) -> torch.Tensor:
    """The mean of step t under the weights that sampled it: what is left of x_{t-1} without its noise, (B, ...)."""
    trajectory = rollout.trajectory
    return trajectory.latents[t - 1] - trajectory.std(t) * trajectory.noise(t)
