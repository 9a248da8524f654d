"""What estimators need of a chain, and what a sampled one leaves behind: enough to replay any step exactly.

Estimators never see a pipeline: a closed-form chain proves them unbiased.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from rlr_peft.chain.path import GaussianStep, PathPoint
from rlr_peft.prompt import Prompt, PromptLike


@dataclass(frozen=True)
class Trajectory:
    """One batch of samples from noise to clean latents, in which steps count as in the paper: t = T first, t = 1 last.

    Attributes:
        prompts: the prompt of every sample, length B.
        latents: ``latents[t]`` is x_t, from the clean ``latents[0]`` to the noise ``latents[T]``; (T + 1, B, ...).
        noises: standard normal draws, (T + 1, B, ...); ``noises[t - 1]`` drives step t and ``noises[T]`` is x_T.
        stds: ``stds[t - 1]`` is the standard deviation of step t, length T.
        pred_original_samples: ``pred_original_samples[t - 1]`` is the prediction of x_0 made at step t, (T, B, ...).
        dropout_seed: seed of LoRA dropout's masks, so that a replay drops what sampling dropped.
    """

    prompts: list[Prompt]
    latents: torch.Tensor
    noises: torch.Tensor
    stds: tuple[float, ...]
    pred_original_samples: torch.Tensor
    dropout_seed: int = 0

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.stds)

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return len(self.prompts)

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        return self.stds[t - 1]

    def noise(self, t: int) -> torch.Tensor:
        """The standard normal draw of step t, (B, ...); ``noise(T + 1)`` is the initial latents."""
        return self.noises[t - 1]

    def mean(self, t: int) -> torch.Tensor:
        """The mean of step t by the weights that sampled it, (B, ...): what is left of x_{t-1} without its noise."""
        return self.latents[t - 1] - self.std(t) * self.noise(t)

    def select(self, samples: list[int]) -> "Trajectory":
        """The trajectory of some of the samples."""
        return replace(
            self,
            prompts=[self.prompts[i] for i in samples],
            latents=self.latents[:, samples],
            noises=self.noises[:, samples],
            pred_original_samples=self.pred_original_samples[:, samples],
        )


class Chain(Protocol):
    """A chain ``x_T -> ... -> x_0`` of Gaussian steps with trainable parameters; t = T is the first step, 1 the last.

    Attributes:
        num_steps: T.
        denoiser_evaluations: number of single-sample denoiser evaluations so far; a guided pair counts once.
        departures: what makes the derivatives of its steps others than those of the samples, one clause each.
    """

    num_steps: int
    denoiser_evaluations: int

    @property
    def mixes_samples(self) -> bool:
        """Whether a sample's step depends on the others of its batch, as masks of LoRA dropout do."""

    @property
    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """The trainable parameters, in a fixed order."""

    @property
    def departures(self) -> tuple[str, ...]:
        """See above."""

    def std(self, t: int) -> float:
        """Standard deviation of step t; 0 where the step is deterministic."""

    def output_sensitivity(self, t: int) -> float:
        """``|d mean / d denoiser output|`` of step t."""

    def input_sensitivity(self, t: int) -> float:
        """``d mean / d x_t`` of step t with the flow velocity held fixed."""

    def prediction_sensitivity(self, t: int) -> float:
        """``|d prediction of x_0 / d denoiser output|`` of step t."""

    def path_point(self, t: int) -> PathPoint:
        """Where on the noising path x_t lies; t = 0 is the clean end."""

    def sample(
        self, prompts: Sequence[PromptLike], seeds: Sequence[int], noises: torch.Tensor | None = None
    ) -> Trajectory:
        """Samples the chain without a tape; sample i depends on ``seeds[i]`` alone, whatever its batch.

        ``noises`` are used instead of those that ``draw_noises`` makes of the seeds, where they are given.
        """

    def replay(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more, on the tape if gradients are enabled; from ``latents`` if given, else the stored x_t."""

    def without_guidance(self) -> AbstractContextManager[None]:
        """Inside, replays are of the conditional prediction alone."""

    def separate_samples(self, count: int) -> AbstractContextManager[None] | None:
        """Inside, batches of ``count`` samples are replayed with parameters (count, ...), each sample with its own.

        They all have the parameters' values, and derivatives by them are those of single samples. None if the chain
        cannot.
        """

    def replay_reference(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more by the reference, the base without adapter."""

    def denoise(
        self,
        trajectory: Trajectory,
        start: int,
        latents: torch.Tensor,
        stop: int = 0,
        noises: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs steps ``start, ..., stop + 1`` without a tape from x_start = ``latents``; returns x_stop, (B, ...).

        The trajectory lends its prompts, and its noises unless others are given in the same layout.
        """

    def draw_noises(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal noises in the layout of ``Trajectory.noises``, (T + 1, B, ...)."""


def noisy_steps(chain: Chain) -> list[int]:
    """Its steps that have noise, from 1 on."""
    return [t for t in range(1, chain.num_steps + 1) if chain.std(t) > 0]


class Decoder(Protocol):
    """Turns clean latents into images."""

    def decode(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of clean latents (B, ...), on the tape if gradients are enabled."""
