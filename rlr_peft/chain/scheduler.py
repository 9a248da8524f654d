"""Stands in for a pipeline's scheduler: shows it a slice of the grid, takes the Gaussian step, records it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from rlr_peft.chain.grid import (
    BaseScheduler,
    InferenceScheduler,
    TimestepSpacing,
    base_scheduler,
    check_grid,
    inference_scheduler,
    make_grid,
    prediction_type,
)
from rlr_peft.chain.steps import (
    DEAD_STEP,
    GaussianStep,
    Grid,
    PathPoint,
    StepKind,
    gaussian_step,
    input_sensitivity,
    output_sensitivity,
    prediction_sensitivity,
    step_std,
)


@dataclass
class RecordedSteps:
    """What one pass over a slice of the grid left behind; lists run noise first."""

    latents: list[torch.Tensor] = field(default_factory=list)
    steps: list[GaussianStep] = field(default_factory=list)

    def extend(self, later: RecordedSteps) -> None:
        """Appends what the next slice left behind."""
        self.latents += later.latents
        self.steps += later.steps

    @staticmethod
    def joined(parts: Sequence[RecordedSteps], axis: int = 0) -> RecordedSteps:
        """One record of latents (B, ...) whose parts along an axis took the same steps one after another."""
        steps = [
            GaussianStep(
                torch.cat([step.mean for step in same], axis),
                same[0].std,
                torch.cat([step.pred_original_sample for step in same], axis),
            )
            for same in zip(*(part.steps for part in parts), strict=True)
        ]
        latents = zip(*(part.latents for part in parts), strict=True)
        return RecordedSteps([torch.cat(same, axis) for same in latents], steps)


class RecordingScheduler:
    """Quacks like a diffusers scheduler for the pipeline's own ``__call__``.

    ``expose`` chooses the slice of steps that the next call sees and the noises it uses; ``recorded`` holds the result.
    The first call settles the grid: pipelines pass noise levels and a shift that depend on the resolution.

    Args:
        timestep_spacing: of the grid; see ``make_grid``.
        noise_window: first and last step with noise; None for all.

    Attributes:
        noise_window: as given; it may change between two samples.
        sound: steps the last tokens of the latents, the sound of a video; None where the pipeline made no copy for it.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self,
        base: BaseScheduler,
        kind: StepKind,
        eta: float,
        timestep_spacing: TimestepSpacing | None = None,
        noise_window: Sequence[int] | None = None,
    ) -> None:
        self.config = base.config
        self.kind = kind
        self.eta = eta
        self.prediction_type = prediction_type(base)
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self.recorded = RecordedSteps()
        self.on_step: Callable[[int], object] | None = None
        self.latents_shape: tuple[int, ...] | None = None
        self.sound: RecordingScheduler | None = None
        self._is_sound = False
        self._base = base
        self._is_inverted = bool(self.config.get("invert_sigmas"))  # time and velocity lead from noise to data
        self._timestep_spacing = timestep_spacing
        self.noise_window = noise_window
        self._settled: Grid | None = None
        self._mu: float | None = None
        self._request: dict[str, Any] = {}
        self._noises: torch.Tensor | None = None
        self._next_step = 0
        self._exposed = range(0)

    @property
    def grid(self) -> Grid:
        """The settled grid.

        Raises:
            ValueError: the pipeline has not asked for timesteps, so it does not run on this scheduler.
        """
        if self._settled is None:
            raise ValueError(
                "The pipeline never called scheduler.set_timesteps: it does not denoise with its `scheduler`, so it "
                "cannot be driven as a chain."
            )
        return self._settled

    def expose(self, start: int, stop: int, noises: torch.Tensor | None) -> None:
        """Shows steps ``start, ..., stop + 1`` (none if equal) to the next call; ``noises[t - 1]`` drives step t."""
        self._exposed = range(start, stop, -1)
        self._noises = noises
        self._next_step = start
        self.recorded, self.sound = RecordedSteps(), None

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordingScheduler:
        """What a pipeline steps its sound with, after its pictures: the same steps on the last tokens."""
        self.sound = sound = copy.copy(self)
        sound.recorded, sound.on_step, sound._is_sound = RecordedSteps(), None, True
        return sound

    def of_samples(self, samples: slice) -> RecordingScheduler:
        """Another one that exposes the same steps for a part of the batch, and has recorded none."""
        part = copy.copy(self)
        part._noises = None if self._noises is None else self._noises[:, samples]
        part.recorded = RecordedSteps()
        return part

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Called by the pipeline: the slice replaces the grid it asks for."""
        if self._settled is None:
            if sigmas is None and timesteps is not None and self.prediction_type == "flow_prediction":
                sigmas, timesteps = [float(t) / self.config.num_train_timesteps for t in timesteps], None
            steps = len(sigmas) if num_inference_steps is None else num_inference_steps
            grid = make_grid(self._base, steps, self._timestep_spacing, sigmas, mu, timesteps)
            check_grid(grid, self.prediction_type)
            self._settled, self._mu = grid, mu
            asked = {"num_inference_steps": steps, "sigmas": sigmas, "mu": mu, "timesteps": timesteps}
            self._request = {name: value for name, value in asked.items() if value is not None}
        grid = self._settled
        first = grid.num_steps - self._exposed.start if len(self._exposed) else grid.num_steps
        stop = first + len(self._exposed)
        self.timesteps = grid.timesteps[first:stop].to(device)
        points = grid.points[first:stop]  # pipelines read their levels as numbers
        self.sigmas = torch.tensor([point.alpha if self._is_inverted else point.sigma for point in points])
        self._announce_step()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Part of the interface; the slice says where to begin."""

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The models see the latents as they are."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        per_token_timesteps: torch.Tensor | None = None,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Takes and records the Gaussian step; the latents keep their own precision, and the generator is not used.

        Raises:
            ValueError: tokens with timesteps of their own.
        """
        t = self._next_step
        current, following = self.grid.step_points(t)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)  # a double denoiser may get single latents
        latents, output = self._unfolded(sample.to(dtype)), self._unfolded(model_output.to(dtype))
        output = output * self._sign(timestep, per_token_timesteps)
        kind = self._kind(t, following)
        step = gaussian_step(kind, self.prediction_type, latents, output, current, following, self.eta)
        latents = step.mean if self._noises is None else step.next_latents(self._own(self._noises[t - 1], latents))
        self.recorded.steps.append(step)
        self.recorded.latents.append(latents)
        self._next_step = t - 1
        self._announce_step()
        folded = self._folded(latents, sample)
        return SchedulerOutput(prev_sample=folded) if return_dict else (folded,)

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        current, following = self.grid.step_points(t)
        return step_std(self._kind(t, following), current, following, self.eta)

    def output_sensitivity(self, t: int) -> float:
        """``|d mean / d denoiser output|`` of step t."""
        return self._sensitivity(self.grid, t)

    def input_sensitivity(self, t: int) -> float:
        """``d mean / d x_t`` of step t with the flow velocity held fixed."""
        current, following = self.grid.step_points(t)
        return input_sensitivity(self._kind(t, following), current, following, self.eta)

    def prediction_sensitivity(self, t: int) -> float:
        """``|d prediction of x_0 / d denoiser output|`` of step t."""
        return prediction_sensitivity(self.prediction_type, self.path_point(t))

    def path_point(self, t: int) -> PathPoint:
        """Where on the noising path x_t lies."""
        return self.grid.step_points(t)[0] if t else self.grid.step_points(1)[1]

    def for_inference(self, own_config: Any, call_parameters: Collection[str]) -> InferenceScheduler:
        """The diffusers scheduler that draws like this one.

        Args:
            own_config: of the scheduler that the pipeline came with.
        """
        is_noisy = any(self.std(t) > 0 for t in range(1, self.grid.num_steps + 1))
        return inference_scheduler(
            own_config,
            self._base,
            self.grid,
            self._request,
            timestep_spacing=self._timestep_spacing,
            noise=self.kind if is_noisy else None,
            eta=self.eta,
            call_parameters=call_parameters,
        )

    def last_step_warning(self) -> str | None:
        """A sentence if the last step hardly passes on what the denoiser outputs."""
        sensitivity = self.output_sensitivity(1)
        if sensitivity >= DEAD_STEP:
            return None
        text = (
            f"The last step is nearly dead: |d x_0 / d output| = {sensitivity:.3f} there, so first-order gradients of "
            "few steps are weak."
        )
        trailing = make_grid(base_scheduler(self._base, "trailing"), self.grid.num_steps, "trailing", None, self._mu)
        alternative = self._sensitivity(trailing, 1)
        if alternative >= 2 * sensitivity:
            text += f" With --timestep_spacing trailing it is {alternative:.3f}."
        return text

    def _sign(self, timestep: Any, per_token_timesteps: torch.Tensor | None) -> int:
        """Of what the denoiser outputs: -1 where its velocity leads from noise to data."""
        sign = -1 if self._is_inverted else 1
        if per_token_timesteps is None:
            return sign
        if (per_token_timesteps - timestep).abs().max() > 1e-3:
            raise ValueError("expected one timestep for all latents, got tokens with others: those of a condition")
        return -sign  # as diffusers takes it with timesteps of tokens

    def _own(self, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The noise of these latents: of a video with sound that of its first tokens, of its sound that of the last."""
        tokens = latents.shape[1]
        return noise[:, -tokens:] if self._is_sound else noise[:, :tokens]

    def _kind(self, t: int, following: PathPoint) -> StepKind:
        """A flow-SDE step is noisier than where it leads: at the end, even one just short of clean, that would stay."""
        window = self.noise_window
        if window is not None and not window[0] <= t <= window[1]:
            return "ode"
        return "ode" if self.kind == "flow-sde" and t == 1 and following.sigma > 0 else self.kind

    def _sensitivity(self, grid: Grid, t: int) -> float:
        current, following = grid.step_points(t)
        return output_sensitivity(self._kind(t, following), self.prediction_type, current, following, self.eta)

    def _announce_step(self) -> None:
        """Before a step's denoiser runs: here, since not every pipeline calls ``scale_model_input``."""
        if self.on_step is not None and self._next_step > self._exposed.stop:
            self.on_step(self._next_step)

    def _unfolded(self, sample: torch.Tensor) -> torch.Tensor:
        """What a pipeline's step sees, in the form of the latents: (B, C, F, h, w) where it has the frames of videos in
        the batch, (B * F, C, h, w), and packed, (B, S, C), where it has them unpacked, (B, C, F, h, w)."""
        shape = self.latents_shape
        if shape is None or sample.ndim == len(shape) + 1:
            return sample
        if len(shape) == 2:
            return sample.flatten(2).transpose(1, 2)
        channels, frames, height, width = shape
        return sample.reshape(-1, frames, channels, height, width).permute(0, 2, 1, 3, 4)

    def _folded(self, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if latents.ndim == like.ndim:
            return latents
        if latents.ndim == 3:
            return latents.transpose(1, 2).reshape(like.shape)
        return latents.permute(0, 2, 1, 3, 4).reshape(like.shape)
