"""Clipped policy gradients (PPO) over the chain's steps: DDPO and GRPO.

Each step is an action with density ``p(x_{t-1} | x_t)``. Several optimiser steps may use the same samples: the density
ratio ``r`` of the present to the sampling weights corrects for it, and is clipped. With one epoch ``r = 1``, and what
is left is the score-function gradient with the method's own advantages.

Log densities SUM over latent dimensions, so ``clip_range`` bounds the ratio of whole steps.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlr_peft.chain.adjoint import ReplayedStep, add_to_gradients
from rlr_peft.chain.interface import Chain
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.estimators.advantages import PromptStatistics, group_normalized
from rlr_peft.estimators.coverage import Coverage
from rlr_peft.estimators.estimator import EstimatorReport, StatelessEstimator
from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.hot_steps import hot_steps
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.plan import Plan, make_plan
from rlr_peft.estimators.rlr_settings import RLRSettings
from rlr_peft.estimators.rollout import Rollout, per_sample


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


class PolicyGradientEstimator(StatelessEstimator):
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

    def observe(self, prompts: Sequence[str], rewards: torch.Tensor) -> None:
        """Adds the rewards of all processes to the prompts' statistics."""
        if self.settings.advantage == "prompt-statistics":
            self._prompt_statistics.observe(prompts, rewards)

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Normalised and clipped advantages (N,)."""
        if self.settings.advantage == "prompt-statistics":
            advantages = self._prompt_statistics.normalized(rewards, prompts)
        else:
            advantages = group_normalized(rewards, group_size)
        return advantages.clamp(-self.settings.advantage_clip, self.settings.advantage_clip)

    def accumulate(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> EstimatorReport:
        """Adds the gradient of the clipped surrogate, summed over the micro-batch, to ``.grad``."""
        plan = plan_steps(self.settings.steps, chain, generator)
        norm, numbers = 0.0, defaultdict(list)
        for block, weight in plan.blocks:
            t = block.first_step
            step = ReplayedStep(chain, rollout.trajectory, t, with_latents=False)
            cotangent, ratio = clipped_cotangent(rollout, t, step.mean.detach(), self.settings.clip_range)
            norm += add_to_gradients(chain, step.into_parameters(weight * cotangent))
            deviation = (ratio - 1).abs()
            numbers["policy_ratio_deviation"].append(float(deviation.mean()))
            numbers["policy_clip_fraction"].append(float((deviation > self.settings.clip_range).double().mean()))
        departures = ["advantages are divided by a standard deviation that contains the sample's own reward"]
        if self.inner_epochs > 1:
            departures.append("later inner epochs use samples of earlier weights, with clipped ratios")
        return EstimatorReport(
            coverage=Coverage(plan.coverage.weights, plan.coverage.gaps, departures=tuple(departures)),
            gradient_norms={"policy_gradient": norm / rollout.trajectory.batch_size},
            backward_steps=len(plan.blocks),
            hot_steps=hot_steps(chain, plan),
            metrics={name: sum(values) / len(values) for name, values in numbers.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """The prompts' statistics."""
        return self._prompt_statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._prompt_statistics.load_state_dict(state)


def plan_steps(steps: HalfOrder, chain: Chain, generator: torch.Generator) -> Plan:
    """The single steps of one micro-batch, with weight 1 / q where they are drawn."""
    return make_plan(
        RLRSettings(first_order_steps=0, half_order=steps),
        chain,
        first_order_steps=0,
        differentiable=False,
        running_norms={},
        generator=generator,
    )


def clipped_cotangent(
    rollout: Rollout, t: int, mean: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivative of ``min(A r, A clip(r, 1 - c, 1 + c))`` by the present mean of step t, and the ratios.

    Args:
        rollout: sampled with earlier weights, or the present ones.
        t: a step with noise.
        mean: of step t under the present weights, (B, ...).
        clip_range: c.

    Returns:
        ``A r z / sigma`` with the present standardised noise z, (B, ...), zero for samples whose ratio is clipped;
        and r, (B,).
    """
    noise = standardized_noise(rollout.trajectory, t, mean)
    ratio = ((rollout.trajectory.noise(t).square() - noise.square()).flatten(1).sum(1) / 2).exp()
    advantages = rollout.advantages.to(ratio.dtype)
    clipped = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    # A sample without advantage adds nothing, even where its ratio overflows.
    factor = torch.where(clipped | (advantages == 0), 0.0, advantages * ratio)
    return per_sample(factor, noise) * noise / rollout.trajectory.std(t), ratio


def standardized_noise(trajectory: Trajectory, t: int, mean: torch.Tensor) -> torch.Tensor:
    """``(x_{t-1} - mean) / sigma_t``: the noise that a step with this mean would have needed, (B, ...)."""
    return (trajectory.latents[t - 1] - mean) / trajectory.std(t)
