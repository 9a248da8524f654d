"""Clipped policy gradients (PPO) over the chain's steps: DDPO and GRPO.

Each step is an action with density ``p(x_{t-1} | x_t)``. Several optimiser steps may use the same samples: the density
ratio ``r`` of the present to the sampling weights corrects for it, and is clipped. With one epoch ``r = 1``, and what
is left is the score-function gradient with the method's own advantages.

Log densities SUM over latent dimensions, so ``clip_range`` bounds the ratio of whole steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from rlr_peft.chain.adjoint import Segment, per_sample
from rlr_peft.chain.interface import Chain
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.estimators.advantages import PromptStatistics, group_normalized
from rlr_peft.estimators.base import Book, Coverage, Estimator, Rollout
from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.layout import Layout, RLRSettings, lay_out
from rlr_peft.estimators.objective import Objective


@dataclass(frozen=True)
class PolicyGradientSettings:
    """How DDPO and GRPO differ, and what they share.

    Attributes:
        advantage: "prompt-statistics" (DDPO) or "group-normalized" (GRPO).
        steps: which steps train, all or some drawn for every micro-batch; single steps.
        inner_epochs: optimiser steps on the same samples.
        clip_range: the density ratio of a step is clipped to 1 - c .. 1 + c.
        advantage_clip: advantages are clipped to -a .. a.
        prompt_buffer_size: rewards remembered per prompt, for "prompt-statistics".
        prompt_min_count: rewards a prompt needs for statistics of its own.
    """

    advantage: Literal["prompt-statistics", "group-normalized"]
    steps: HalfOrder
    inner_epochs: int = 1
    clip_range: float = 0.2
    advantage_clip: float = 5.0
    prompt_buffer_size: int = 32
    prompt_min_count: int = 16


class PolicyGradientEstimator(Estimator):
    """DDPO (Black et al. 2024) or GRPO (Shao et al. 2024; for flow chains Flow-GRPO, Liu et al. 2025)."""

    def __init__(self, settings: PolicyGradientSettings) -> None:
        self.settings = settings
        self.inner_epochs = settings.inner_epochs
        self._prompt_statistics = PromptStatistics(settings.prompt_buffer_size, settings.prompt_min_count)

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards."""
        s = self.settings
        steps = "all steps" if s.steps.blocks == "all" else f"{s.steps.blocks} drawn step(s)"
        normalised = {"prompt-statistics": "per-prompt statistics", "group-normalized": "group-normalised"}[s.advantage]
        return (
            f"clipped policy gradient on {steps}, {normalised} advantages, ratios clipped at {s.clip_range:g}, "
            f"{s.inner_epochs} inner epoch(s)"
        )

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Normalised and clipped advantages (N,)."""
        if self.settings.advantage == "prompt-statistics":
            advantages = self._prompt_statistics.normalized(rewards, prompts)
        else:
            advantages = group_normalized(rewards, group_size)
        return advantages.clamp(-self.settings.advantage_clip, self.settings.advantage_clip)

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """All steps with noise, or those that are drawn."""
        departures = ["advantages are divided by a standard deviation that contains the sample's own reward"]
        if self.inner_epochs > 1:
            departures.append("later inner epochs use samples of earlier weights, with clipped ratios")
        return replace(single_steps(self.settings.steps, chain).coverage, departures=tuple(departures))

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> Iterator[Segment]:
        """The gradient of the clipped surrogate, step by step."""
        blocks, _ = single_steps(self.settings.steps, chain).draw(generator)
        for block, weight in blocks:
            t = block.first_step
            pull = partial(clipped_cotangent, rollout, clip_range=self.settings.clip_range)
            yield Segment("policy_gradient", (t,), None, weight, into_parameters=pull, score_steps=(t,))

    def learn(self, books: Sequence[Book]) -> None:
        """Adds the rewards of all processes to the prompts' statistics."""
        if self.settings.advantage == "prompt-statistics":
            for book in books:
                self._prompt_statistics.observe(book.prompts, book.rewards)

    def state_dict(self) -> dict[str, Any]:
        """The prompts' statistics."""
        return self._prompt_statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._prompt_statistics.load_state_dict(state)


def single_steps(steps: HalfOrder, chain: Chain) -> Layout:
    """Single steps with noise, all of them or some that are drawn with weight 1 / q."""
    return lay_out(RLRSettings(0, steps), chain, first_order_steps=0, has_gradient=False)


def clipped_cotangent(
    rollout: Rollout, t: int, mean: torch.Tensor, _: torch.Tensor | None = None, *, clip_range: float
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Derivative of ``min(A r, A clip(r, 1 - c, 1 + c))`` by the present mean of step t.

    Args:
        rollout: sampled with earlier weights, or the present ones.
        t: a step with noise.
        mean: of step t under the present weights, (B, ...).
        clip_range: c.

    Returns:
        ``A r z / sigma`` with the present standardised noise z, (B, ...), zero for samples whose ratio is clipped; and
        how far the ratios r are from 1, for the logs.
    """
    noise = standardized_noise(rollout.trajectory, t, mean)
    ratio = ((rollout.trajectory.noise(t).square() - noise.square()).flatten(1).sum(1) / 2).exp()
    advantages = rollout.advantages.to(ratio.dtype)
    clipped = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    # A sample without advantage adds nothing, even where its ratio overflows.
    factor = torch.where(clipped | (advantages == 0), 0.0, advantages * ratio)
    deviation = (ratio - 1).abs()
    numbers = {
        "policy_ratio_deviation": float(deviation.mean()),
        "policy_clip_fraction": float((deviation > clip_range).double().mean()),
    }
    return per_sample(factor, noise) * noise / rollout.trajectory.std(t), numbers


def standardized_noise(trajectory: Trajectory, t: int, mean: torch.Tensor) -> torch.Tensor:
    """``(x_{t-1} - mean) / sigma_t``: the noise that a step with this mean would have needed, (B, ...)."""
    return (trajectory.latents[t - 1] - mean) / trajectory.std(t)
