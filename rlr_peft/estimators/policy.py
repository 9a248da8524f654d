"""Methods that train on the likelihood of single steps: clipped policy gradients (DDPO, GRPO) and preferences (D3PO).

Each step is an action with density ``p(x_{t-1} | x_t)``. Several optimiser steps may use the same samples.

DDPO and GRPO correct for that by the density ratio ``r`` of the present to the sampling weights, which is clipped. With
one epoch ``r = 1``, and what is left is the score-function gradient with the method's own advantages. Log densities SUM
over latent dimensions, so ``clip_range`` bounds the ratio of whole steps.

With the noise eps of the sample and a mean that has moved by d, ``log r = <d, eps> / std - |d|^2 / (2 std^2)``: below 0
on average, and the more so the less noise a step has, so that clipping from above is rare. GRPO-Guard (2510.22319)
takes ``<d, eps>`` in place of it, and divides the gradient by the length of the step, so that all steps weigh the same
in the flow velocity. Lengths and latents are those of the flow path that the chain's path becomes by rescaling.

D3PO prefers of two samples of a prompt the one with the higher reward. Every step then raises
``log sigmoid(beta (log p / p_ref (preferred) - log p / p_ref (other)))``, the reference being the base model. Only the
order of the rewards counts (Yang et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
CVPR 2024).
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch

from rlr_peft.chain.adjoint import IntoParameters, Segment, per_sample
from rlr_peft.chain.steps import Chain, PathPoint, Trajectory
from rlr_peft.config.policy import D3POArguments, DDPOArguments, GRPOArguments, ReusedSamplesArguments
from rlr_peft.estimators.advantages import PromptStatistics, group_normalized, normalised_in_words
from rlr_peft.estimators.base import Book, Coverage, Estimator, RunShape
from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.kl import reference_mean, step_kl
from rlr_peft.estimators.layout import Layout, RLRSettings, lay_out
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.reports import counted


class SingleStepsEstimator(Estimator):
    """One segment for every step that trains: all with noise, or some that are drawn for every micro-batch.

    Attributes:
        steps: which train; single steps.
        term: name of the segments.
        departures: what makes the estimate another than the gradient of the expected reward, one clause each.
    """

    term: str
    departures: tuple[str, ...]

    def __init__(self, arguments: ReusedSamplesArguments, shape: RunShape) -> None:
        self.steps = HalfOrder.from_arguments(arguments, shape)
        self.inner_epochs = arguments.inner_epochs

    @classmethod
    def from_arguments(cls, arguments: ReusedSamplesArguments, shape: RunShape) -> Self:
        return cls(arguments, shape)

    @abstractmethod
    def pull(self, chain: Chain, rollout: Rollout, advantages: torch.Tensor, t: int) -> IntoParameters:
        """What makes the cotangent of step t."""

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        return replace(single_steps(self.steps, chain).coverage, departures=self.departures)

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterator[Segment]:
        """The gradient of the method's own objective, summed over samples, step by step."""
        blocks, _ = single_steps(self.steps, chain).draw(generator)
        for block, weight in blocks:
            pull = self.pull(chain, rollout, advantages, block[0])
            yield Segment(self.term, block, None, weight, into_parameters=pull, score_steps=(block[0],))

    def steps_in_words(self) -> str:
        """Which train."""
        return "all steps" if self.steps.blocks == "all" else counted(self.steps.blocks, "drawn step")


class PolicyGradientEstimator(SingleStepsEstimator):
    """DDPO (Black et al. 2024) or GRPO (Shao et al. 2024; for flow chains Flow-GRPO, Liu et al. 2025)."""

    term = "policy_gradient"

    def __init__(self, arguments: DDPOArguments | GRPOArguments, shape: RunShape) -> None:
        super().__init__(arguments, shape)
        self.arguments = arguments
        self.advantage_clip = arguments.advantage_clip
        self.departures = ("advantages are divided by a standard deviation that contains the sample's own reward",)
        if arguments.inner_epochs > 1:
            held = "clipped" if arguments.divergence_limit is None else "masked"
            self.departures += (f"later inner epochs use samples of earlier weights, with {held} ratios",)
        if arguments.ratio_norm:
            self.departures += ("every step is weighted by its noise over its length",)
        ddpo = arguments if isinstance(arguments, DDPOArguments) else DDPOArguments()  # of GRPO they stay empty
        self._prompt_statistics = PromptStatistics(
            ddpo.per_prompt_stat_tracking_buffer_size, ddpo.per_prompt_stat_tracking_min_count
        )

    def describe(self, has_gradient: bool | None = None) -> str:
        knobs, normalised = self.arguments, "per-prompt statistics"
        if isinstance(knobs, GRPOArguments):
            normalised = normalised_in_words(knobs.advantage_std)
        kind, trust = "clipped ", f"{'normalised ' if knobs.ratio_norm else ''}ratios clipped at {knobs.clip_range:g}"
        if knobs.divergence_limit is not None:
            kind, trust = "", f"masked beyond {knobs.divergence_limit:g} nats"
        return (
            f"{kind}policy gradient on {self.steps_in_words()}, {normalised} advantages, {trust}, "
            f"{counted(self.inner_epochs, 'inner epoch')}"
        )

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        if isinstance(self.arguments, GRPOArguments):
            advantages = group_normalized(rewards, group_size, self.arguments.advantage_std)
        else:
            advantages = self._prompt_statistics.normalized(rewards, prompts)
        return self._clipped_advantages(advantages)

    def pull(self, chain: Chain, rollout: Rollout, advantages: torch.Tensor, t: int) -> IntoParameters:
        knobs, trajectory = self.arguments, rollout.trajectory
        if knobs.ratio_norm:
            points = chain.path_point(t), chain.path_point(t - 1)
            return partial(normalized_cotangent, trajectory, advantages, clip_range=knobs.clip_range, points=points)
        return partial(
            clipped_cotangent,
            trajectory,
            advantages,
            clip_range=knobs.clip_range,
            divergence_limit=knobs.divergence_limit,
        )

    def learn(self, books: Sequence[Book]) -> None:
        if isinstance(self.arguments, DDPOArguments):
            for book in books:
                self._prompt_statistics.observe(book.prompts, book.rewards)

    def state_dict(self) -> dict[str, Any]:
        return self._prompt_statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._prompt_statistics.load_state_dict(state)


def single_steps(steps: HalfOrder, chain: Chain) -> Layout:
    """Single steps with noise, all of them or some that are drawn with weight 1 / q."""
    return lay_out(RLRSettings(0, steps), chain, first_order_steps=0, has_gradient=False)


def clipped_cotangent(
    trajectory: Trajectory,
    advantages: torch.Tensor,
    t: int,
    mean: torch.Tensor,
    _: torch.Tensor | None = None,
    *,
    clip_range: float,
    divergence_limit: float | None = None,
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Derivative of ``min(A r, A clip(r, 1 - c, 1 + c))`` by the present mean of step t; or, masked, of ``A r``.

    Args:
        trajectory: sampled with earlier weights, or the present ones.
        advantages: A, (B,).
        t: a step with noise.
        mean: of step t under the present weights, (B, ...).
        clip_range: c.
        divergence_limit: in nats; a sample is masked where its step's KL from the sampling weights exceeds it and the
            ratio would move further away from 1. None clips.

    Returns:
        ``A r z / sigma`` with the present standardised noise z, (B, ...), zero for samples that are clipped or masked;
        and how far the ratios r are from 1, for the logs.
    """
    noise = standardized_noise(trajectory, t, mean)
    ratio = ((trajectory.noise(t).square() - noise.square()).flatten(1).sum(1) / 2).exp()
    if divergence_limit is None:
        outside = (ratio - 1).abs() > clip_range
    else:
        outside = step_kl(mean, trajectory.mean(t), trajectory.std(t)) > divergence_limit
    factor = _kept(advantages.to(ratio.dtype), ratio, outside)
    return per_sample(factor, noise) * noise / trajectory.std(t), _numbers(ratio, outside)


def normalized_cotangent(
    trajectory: Trajectory,
    advantages: torch.Tensor,
    t: int,
    mean: torch.Tensor,
    _: torch.Tensor | None = None,
    *,
    clip_range: float,
    points: tuple[PathPoint, PathPoint],
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Derivative of ``min(A r, A clip(r, 1 - c, 1 + c)) / dt`` by the present mean of step t, ``r = exp(<d, eps>)``.

    Args:
        trajectory: sampled with earlier weights, or the present ones.
        advantages: A, (B,).
        t: a step with noise.
        mean: of step t under the present weights, (B, ...).
        clip_range: c.
        points: where the step starts and where it leads. Their shares of noise give the length dt.

    Returns:
        As ``clipped_cotangent``.
    """
    eps = trajectory.noise(t)
    start, end = points
    ratio = (((mean - trajectory.mean(t)) * eps).flatten(1).sum(1) / end.scale).exp()
    outside = (ratio - 1).abs() > clip_range
    length = start.noise_share - end.noise_share
    factor = _kept(advantages.to(ratio.dtype), ratio, outside) / (end.scale * length)
    return per_sample(factor, eps) * eps, _numbers(ratio, outside)


def _kept(advantages: torch.Tensor, ratio: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """``A r``, (B,), 0 for samples outside the trust region that would move further away."""
    left_out = outside & torch.where(advantages > 0, ratio > 1, ratio < 1)
    # A sample without advantage adds nothing, even where its ratio overflows.
    return torch.where(left_out | (advantages == 0), 0.0, advantages * ratio)


def _numbers(ratio: torch.Tensor, outside: torch.Tensor) -> Mapping[str, float]:
    """How far the ratios are from 1, and the share that is outside the trust region, for the logs."""
    return {
        "policy_ratio_deviation": float((ratio - 1).abs().mean()),
        "policy_clip_fraction": float(outside.double().mean()),
    }


def standardized_noise(trajectory: Trajectory, t: int, mean: torch.Tensor) -> torch.Tensor:
    """``(x_{t-1} - mean) / sigma_t``: the noise that a step with this mean would have needed, (B, ...)."""
    return (trajectory.latents[t - 1] - mean) / trajectory.std(t)


class PreferenceEstimator(SingleStepsEstimator):
    """Trains on neighbouring samples as pairs; a prompt's samples must be an even number, side by side.

    Advantages are for the logs: the gradient needs the order of the rewards alone.
    """

    term = "preference"
    departures = ("the likelihood of pairwise preferences is raised, not the expected reward",)

    def __init__(self, arguments: D3POArguments, shape: RunShape) -> None:
        super().__init__(arguments, shape)
        self.beta = arguments.dpo_beta

    def describe(self, has_gradient: bool | None = None) -> str:
        return (
            f"direct preference optimisation of pairs on {self.steps_in_words()}, beta {self.beta:g}, "
            f"{counted(self.inner_epochs, 'inner epoch')}, the base as reference"
        )

    def pull(self, chain: Chain, rollout: Rollout, advantages: torch.Tensor, t: int) -> IntoParameters:
        of_reference = reference_mean(chain, rollout.trajectory, t)
        return partial(preference_cotangent, rollout, of_reference=of_reference, beta=self.beta)


def preference_cotangent(
    rollout: Rollout,
    t: int,
    mean: torch.Tensor,
    _: torch.Tensor | None = None,
    *,
    of_reference: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Derivative of the pairs' log likelihood by the present mean of step t.

    Args:
        rollout: samples 2i and 2i + 1 are a pair; equal rewards prefer neither and give nothing.
        t: a step with noise.
        mean: of step t under the present weights, (B, ...).
        of_reference: under the reference's, (B, ...).
        beta: strength of the pull towards the reference.

    Returns:
        The cotangent (B, ...); and for the logs the share of pairs whose margin ``log p / p_ref (preferred) -
        log p / p_ref (other)`` is positive.
    """
    noise = standardized_noise(rollout.trajectory, t, mean)
    reference_noise = standardized_noise(rollout.trajectory, t, of_reference)
    log_ratio = (reference_noise.square() - noise.square()).flatten(1).sum(1) / 2
    first, second = rollout.rewards.reshape(-1, 2).to(log_ratio.dtype).T
    preference = torch.sign(first - second)
    margin = preference * (log_ratio[0::2] - log_ratio[1::2])
    slope = preference * beta * torch.sigmoid(-beta * margin)
    factor = torch.stack([slope, -slope], dim=1).reshape(-1)
    numbers = {"preference_accuracy": float((margin > 0).double().mean())}
    return per_sample(factor, noise) * noise / rollout.trajectory.std(t), numbers
