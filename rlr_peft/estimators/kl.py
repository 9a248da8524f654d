"""Divergence from the base: the KL of every step in closed form, as a number and as a gradient.

Both steps are Gaussians of the same std, so ``KL_t = |mu_t - mu_ref,t|^2 / (2 sigma_t^2)``, and their sum over t is the
KL of the whole path. The gradient holds the visited states fixed, as Flow-GRPO's does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rlr_peft.chain.adjoint import Segment
from rlr_peft.chain.interface import Chain, Trajectory
from rlr_peft.errors import UserError
from rlr_peft.estimators.half_order import HalfOrder, draw, draw_probabilities, expected_draws


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


@dataclass(frozen=True)
class ReferenceStep:
    """The base's mean of a step that the samples took.

    Attributes:
        t: the step.
        mean: the base's, from the same x_t, (B, ...).
        weight: of the step in sums over all steps, 1 / q if it was drawn.
    """

    t: int
    mean: torch.Tensor
    weight: float = 1.0


def reference_steps(
    chain: Chain, trajectory: Trajectory, steps: int | Literal["all"], generator: torch.Generator
) -> list[ReferenceStep]:
    """Asks the base for its means of all steps with noise, or of some that are drawn evenly.

    Args:
        chain: with a reference.
        steps: how many are drawn, or "all".
        generator: of the draws, on the CPU.

    Raises:
        NoDivergenceError: no step of the chain has noise.
    """
    blocks = [range(t, t + 1) for t in range(1, chain.num_steps + 1) if chain.std(t) > 0]
    if not blocks:
        raise NoDivergenceError(
            f"Expected noise in the chain, without which the divergence from the base is not defined, got none in its "
            f"{chain.num_steps} step(s). Raise eta or num_inference_steps, or drop the divergence."
        )
    chosen, weights = list(range(len(blocks))), [1.0] * len(blocks)
    if steps != "all":
        probabilities = draw_probabilities(blocks, HalfOrder(1, steps), {})
        weights = [1 / chance for chance in expected_draws(probabilities, steps).tolist()]
        chosen = draw(probabilities, steps, generator)
    drawn = [(blocks[i][0], weights[i]) for i in chosen]
    return [ReferenceStep(t, chain.reference_mean(trajectory, t), weight) for t, weight in drawn]


def path_kl(trajectory: Trajectory, references: Sequence[ReferenceStep]) -> torch.Tensor:
    """KL of the sampled paths from the base's, of the weights that sampled them, (B,) in nats."""
    divergence = torch.zeros(trajectory.batch_size, device=trajectory.latents.device, dtype=trajectory.latents.dtype)
    for step in references:
        # What is left of x_{t-1} without its noise is the mean.
        mean = trajectory.latents[step.t - 1] - trajectory.std(step.t) * trajectory.noise(step.t)
        divergence += step.weight * step_kl(mean, step.mean, trajectory.std(step.t))
    return divergence


def kl_segments(trajectory: Trajectory, references: Sequence[ReferenceStep], beta: float) -> Iterator[Segment]:
    """The terms of ``- beta KL``, summed over the batch, by the present weights."""
    for step in references:

        def pull(
            t: int, mean: torch.Tensor, _: torch.Tensor | None, reference: torch.Tensor = step.mean
        ) -> tuple[torch.Tensor, Mapping[str, float]]:
            return -beta * (mean - reference) / trajectory.std(t) ** 2, {}

        yield Segment("kl", (step.t,), None, step.weight, into_parameters=pull)


def step_kl(mean: torch.Tensor, reference_mean: torch.Tensor, std: float) -> torch.Tensor:
    """KL of two Gaussian steps of the same std, summed over latent dimensions, (B,)."""
    return (mean - reference_mean).square().flatten(1).sum(1) / (2 * std**2)
