"""Measures the gradients of single samples, step by step: how noisy is the pathwise and the score-function gradient?

Pathwise gradients grow towards the noise, because the chain amplifies; score terms shrink, because the steps are
noisier there. Where they cross depends on the model, T and the reward, so it is measured. Kept are sketches, from which
the variance of any combination of steps follows too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlr_peft.chain.adjoint import ReplayedStep
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.gradient_sketch import GradientSketch
from rlr_peft.estimators.rollout import Rollout


@dataclass(frozen=True)
class StepGradients:
    """Sketches of N samples' gradients through every step, at index t - 1.

    Attributes:
        pathwise: G_t, the reward's gradient through step t, (T, N, d); None for a reward without gradient.
        scores: the gradient of ``< eps_t / sigma_t, mu_t >``, (T, N, d); zeros where a step has no noise.
        advantages: of the samples, (N,).
        has_noise: whether step t has a score term, (T,), bool.
        cotangent_squares: squared norm of the reward's derivative at the mean of every step, (T, N), float64; None for
            a reward without gradient.
    """

    pathwise: torch.Tensor | None
    scores: torch.Tensor
    advantages: torch.Tensor
    has_noise: torch.Tensor
    cotangent_squares: torch.Tensor | None = None

    @property
    def half_order(self) -> torch.Tensor:
        """H_t, the score-function gradients ``A < eps_t / sigma_t, mu_t >``, (T, N, d)."""
        return self.advantages[None, :, None] * self.scores


def measure_step_gradients(
    chain: Chain, rollouts: Sequence[Rollout], sketch: GradientSketch, first_order_only: bool = False
) -> StepGradients:
    """Replays every step of every sample once, and pulls back the reward's gradient and the noise.

    Args:
        chain: the chain.
        rollouts: of at least two samples in all.
        sketch: projects the gradients.
        first_order_only: leave the scores at zero, where only the pathwise gradients are wanted.

    Raises:
        ValueError: fewer than two samples.
    """
    samples = [rollout.select([i]) for rollout in rollouts for i in range(len(rollout.rewards))]
    if len(samples) < 2:
        raise ValueError(f"Expected at least 2 samples to measure a variance, got {len(samples)}.")
    shape = (chain.num_steps, len(samples), sketch.dimension)
    pathwise = None if samples[0].reward_gradient is None else torch.zeros(shape)
    squares = None if pathwise is None else torch.zeros(shape[:2], dtype=torch.float64)
    scores = torch.zeros(shape)
    for i, sample in enumerate(samples):
        cotangent = sample.reward_gradient
        for t in range(1, chain.num_steps + 1):
            wants_score = chain.std(t) > 0 and not first_order_only
            if cotangent is None and not wants_score:
                continue
            step = ReplayedStep(chain, sample.trajectory, t, with_latents=cotangent is not None)
            if wants_score:
                noise = sample.trajectory.noise(t) / chain.std(t)
                scores[t - 1, i] = sketch(step.into_parameters(noise, keep=cotangent is not None))
            if cotangent is not None and pathwise is not None and squares is not None:
                squares[t - 1, i] = float(cotangent.double().square().sum())
                gradients, cotangent = step.into_both(cotangent)
                pathwise[t - 1, i] = sketch(gradients)
    advantages = torch.cat([rollout.advantages for rollout in rollouts]).float().cpu()
    has_noise = torch.tensor([chain.std(t) > 0 for t in range(1, chain.num_steps + 1)])
    return StepGradients(pathwise, scores, advantages, has_noise, squares)


@dataclass(frozen=True)
class StepVariances:
    """Variances (traces of covariances) of a single sample's gradient through every step.

    Attributes:
        first_order: V_G(t) at index t - 1, (T,), float64; infinite without a reward gradient.
        half_order: V_H(t) at index t - 1, (T,), float64; infinite where the step has no noise.
    """

    first_order: torch.Tensor
    half_order: torch.Tensor


def step_variances(gradients: StepGradients) -> StepVariances:
    """The variances that the choice between first and half order needs."""
    infinite = torch.full((len(gradients.scores),), torch.inf, dtype=torch.float64)

    def by_step(vectors: torch.Tensor) -> torch.Tensor:
        return torch.stack([variance_and_error(step)[0] for step in vectors])

    return StepVariances(
        first_order=infinite if gradients.pathwise is None else by_step(gradients.pathwise),
        half_order=torch.where(gradients.has_noise, by_step(gradients.half_order), infinite),
    )


def variance_and_error(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Trace of the covariance of the rows of (N, d), and its standard error; both float64.

    Heavy tails show in the error: one sample that makes up all of the variance gives an error as large as the variance.
    """
    count = len(samples)
    squares = (samples.double() - samples.double().mean(0)).square().sum(1) * count / (count - 1)
    return squares.mean(), squares.std() / count**0.5
