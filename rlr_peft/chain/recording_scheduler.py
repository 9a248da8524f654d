"""Stands in for a pipeline's scheduler: shows it a slice of the grid, takes the Gaussian step, records it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler

from rlr_peft.chain.gaussian_step import (
    GaussianStep,
    PathPoint,
    PredictionType,
    StepKind,
    gaussian_step,
    output_sensitivity,
    step_std,
)


@dataclass(frozen=True)
class Grid:
    """The points of the noising path that a chain visits, noise first.

    Attributes:
        timesteps: what the denoiser is told at every step, noise first, (T,).
        points: where each step starts, noise first, length T.
        followings: where each step leads, length T.
    """

    timesteps: torch.Tensor
    points: tuple[PathPoint, ...]
    followings: tuple[PathPoint, ...]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.points)

    def step_points(self, t: int) -> tuple[PathPoint, PathPoint]:
        """Start and end of step t, T first and 1 last."""
        return self.points[self.num_steps - t], self.followings[self.num_steps - t]


def diffusion_grid(scheduler: DDIMScheduler, num_inference_steps: int) -> Grid:
    """The grid of ``DDIMScheduler``, including where it places the end of every step."""
    scheduler.set_timesteps(num_inference_steps)
    stride = scheduler.config.num_train_timesteps // num_inference_steps

    def point(timestep: int) -> PathPoint:
        alpha_squared = scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod
        return PathPoint(float(alpha_squared) ** 0.5, max(0.0, 1 - float(alpha_squared)) ** 0.5)

    timesteps = [int(timestep) for timestep in scheduler.timesteps]
    return Grid(
        timesteps=scheduler.timesteps.clone(),
        points=tuple(point(timestep) for timestep in timesteps),
        followings=tuple(point(timestep - stride) for timestep in timesteps),
    )


@dataclass
class RecordedSteps:
    """What one pass over a slice of the grid left behind; lists run noise first."""

    latents: list[torch.Tensor] = field(default_factory=list)
    steps: list[GaussianStep] = field(default_factory=list)


class RecordingScheduler:
    """Quacks like a diffusers scheduler for the pipeline's own ``__call__``.

    ``expose`` chooses the slice of steps that the next call sees and the noises it uses; ``recorded`` holds the result.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, base: DDIMScheduler, grid: Grid, kind: StepKind, eta: float) -> None:
        self.config = base.config
        self.grid = grid
        self.kind = kind
        self.eta = eta
        self.prediction_type: PredictionType = base.config.prediction_type
        self.timesteps = grid.timesteps
        self.recorded = RecordedSteps()
        self.on_step: Callable[[int], object] | None = None
        self._noises: torch.Tensor | None = None
        self._next_step = 0
        self._exposed = range(0)

    def expose(self, start: int, stop: int, noises: torch.Tensor | None) -> None:
        """Shows steps ``start, ..., stop + 1`` (none if equal) to the next call; ``noises[t - 1]`` drives step t."""
        self._exposed = range(start, stop, -1)
        self._noises = noises
        self._next_step = start
        self.recorded = RecordedSteps()

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:
        """Called by the pipeline: the slice replaces the grid it asks for."""
        first = self.grid.num_steps - self._exposed.start
        self.timesteps = self.grid.timesteps[first : first + len(self._exposed)].to(device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Diffusion models see the latents as they are."""
        if self.on_step is not None:
            self.on_step(self._next_step)
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        """Takes and records the Gaussian step; the latents keep their own precision."""
        t = self._next_step
        current, following = self.grid.step_points(t)
        step = gaussian_step(
            self.kind, self.prediction_type, sample, model_output.to(sample.dtype), current, following, self.eta
        )
        latents = step.mean if self._noises is None else step.next_latents(self._noises[t - 1])
        self.recorded.steps.append(step)
        self.recorded.latents.append(latents)
        self._next_step = t - 1
        return (latents,)

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        return step_std(self.kind, *self.grid.step_points(t), self.eta)

    def output_sensitivity(self, t: int) -> float:
        """``|d mean / d denoiser output|`` of step t."""
        return output_sensitivity(self.kind, self.prediction_type, *self.grid.step_points(t), self.eta)
