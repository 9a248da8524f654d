"""What is measured once, on the same samples for every method: gradients by step, and mirrored rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from rlr_peft.chain.interface import Chain
from rlr_peft.errors import UserError
from rlr_peft.estimators.half_order import mirrored_advantages
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.estimators.step_gradients import GradientSketch, StepGradients, measure_step_gradients
from rlr_peft.estimators.variance import StepVariances, step_variances


class DiagnosisError(UserError, ValueError):
    """The samples cannot tell anything about the estimators."""


# Halves of the samples are compared with each other, and each needs two for a spread.
MIN_SAMPLES = 4
# A mirrored step t costs t - 1 denoiser evaluations per sample, so a tail of n steps costs n (n - 1) / 2.
MAX_BLACK_BOX_STEPS = 6


@dataclass(frozen=True)
class Evidence:
    """What N samples showed.

    Attributes:
        gradients: sketches of every sample's gradients through every step.
        variances: of the pathwise and the score terms by step.
        mirrored: advantages of the black-box tail, ``mirrored[t - 1]`` for step t; (n, N) for a reward without
            gradient, with zeros at steps without noise, else (0, N).
        rewards: (N,) on the CPU.
        prompts: one per sample.
        group_size: samples per prompt, side by side.
        micro_batch_size: samples per trajectory.
    """

    gradients: StepGradients
    variances: StepVariances
    mirrored: torch.Tensor
    rewards: torch.Tensor
    prompts: list[str]
    group_size: int
    micro_batch_size: int

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.gradients.scores)

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.rewards)

    @property
    def differentiable(self) -> bool:
        """Whether the reward has a gradient."""
        return self.gradients.pathwise is not None

    @property
    def noisy_steps(self) -> list[int]:
        """The steps that have a score term."""
        return [t for t in range(1, self.num_steps + 1) if self.gradients.has_noise[t - 1]]


def gather_evidence(
    chain: Chain,
    objective: Objective,
    rollouts: Sequence[Rollout],
    sketch: GradientSketch,
    group_size: int,
) -> Evidence:
    """Replays every step of every sample once.

    Args:
        chain: the chain.
        objective: asked for the rewards of mirrored samples where the reward has no gradient.
        rollouts: N samples in all, with leave-one-out advantages.
        sketch: projects the gradients.
        group_size: samples per prompt.

    Raises:
        DiagnosisError: too few samples, rewards that do not differ, or gradients that are zero.
    """
    rewards = torch.cat([rollout.rewards for rollout in rollouts]).float().cpu()
    _check(rewards, group_size)
    samples = [rollout.select([i]) for rollout in rollouts for i in range(len(rollout.rewards))]
    parts, mirrored = [], []
    is_differentiable = samples[0].reward_gradient is not None
    with tqdm(total=len(samples), desc="Gradients of single samples", unit="sample") as bar:
        # A measurement needs two samples, so an odd one joins the pair before it.
        starts = list(range(0, len(samples) - 1, 2))
        for start, stop in zip(starts, [*starts[1:], len(samples)], strict=True):
            parts.append(measure_step_gradients(chain, samples[start:stop], sketch, with_held=is_differentiable))
            for sample in samples[start:stop]:
                mirrored.append(_mirrored(chain, objective, sample))
            bar.update(stop - start)
    gradients = _joined(parts)
    if gradients.pathwise is not None and not bool(gradients.pathwise.any()):
        raise DiagnosisError(
            "Expected a reward whose gradient is not zero, got zeros for every sample although rewards differ: a "
            "pathwise gradient would train nothing. Mark the reward with `differentiable = False`."
        )
    return Evidence(
        gradients=gradients,
        variances=step_variances(gradients),
        mirrored=torch.cat(mirrored, dim=1),
        rewards=rewards,
        prompts=[prompt.text for rollout in rollouts for prompt in rollout.trajectory.prompts],
        group_size=group_size,
        micro_batch_size=len(rollouts[0].rewards),
    )


def _check(rewards: torch.Tensor, group_size: int) -> None:
    if len(rewards) < MIN_SAMPLES:
        raise DiagnosisError(f"Expected {MIN_SAMPLES} samples or more, got {len(rewards)}; raise --samples.")
    groups = rewards.reshape(-1, group_size)
    if bool((groups == groups[:, :1]).all()):
        raise DiagnosisError(
            f"Expected rewards that differ between the images of a prompt, got the same for all {group_size} images of "
            f"every prompt ({len(groups)} prompts). Look at the images and the reward, or raise --samples."
        )


def _mirrored(chain: Chain, objective: Objective, sample: Rollout) -> torch.Tensor:
    """(n, 1)."""
    steps = 0 if sample.reward_gradient is not None else min(MAX_BLACK_BOX_STEPS, chain.num_steps)
    advantages = torch.zeros(steps, 1)
    for t in range(1, steps + 1):
        if chain.std(t) > 0:
            advantages[t - 1] = mirrored_advantages(chain, objective, sample, t).float().cpu()
    return advantages


def _joined(parts: Sequence[StepGradients]) -> StepGradients:
    pathwise = [part.pathwise for part in parts if part.pathwise is not None]
    squares = [part.cotangent_squares for part in parts if part.cotangent_squares is not None]
    held = [part.held for part in parts if part.held is not None]
    return StepGradients(
        pathwise=torch.cat(pathwise, dim=1) if pathwise else None,
        scores=torch.cat([part.scores for part in parts], dim=1),
        advantages=torch.cat([part.advantages for part in parts]),
        has_noise=parts[0].has_noise,
        cotangent_squares=torch.cat(squares, dim=1) if squares else None,
        held=torch.cat(held, dim=1) if held else None,
    )
