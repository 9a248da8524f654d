"""Drives a diffusers pipeline as a chain of Gaussian steps, through the pipeline's own ``__call__``.

Sampling is the pipeline's call under ``no_grad``; replaying step t is the same call on a slice of one step, with a
tape; decoding is the same call on an empty slice. Guidance, conditioning and decoding are therefore exactly those of
inference, and nothing of a model family is written twice.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.chain.families import family_of, stochastic_scheduler
from rlr_peft.chain.gaussian_step import GaussianStep, StepKind
from rlr_peft.chain.prompt_memory import PromptMemory
from rlr_peft.chain.recording_scheduler import RecordedSteps, RecordingScheduler, diffusion_grid
from rlr_peft.chain.trajectory import Trajectory


class DenoisingChain:
    """A diffusers pipeline as a ``Chain``; see ``rlr_peft.chain.interface`` for the members shared with other chains.

    The pipeline is left as it was after every call: its scheduler and ``encode_prompt`` are exchanged only meanwhile.
    (A half-precision denoiser and decoder keep a hook that casts their inputs.)
    Latents stay in float32 (float64 if the denoiser is), whatever the precision of the denoiser.

    Args:
        pipeline: a loaded pipeline without safety checker; LoRA layers already attached if it is to be trained.
        parameters: what gradients are taken for; by default the denoiser's parameters that require grad.
        num_inference_steps: T.
        step_kind: which Gaussian step to take.
        eta: amount of noise in [0, 1].
        guidance_scale: classifier-free guidance; None takes the family's default.
        negative_prompt: what guidance steers away from.
        resolution: height and width of the images in pixels; None takes the pipeline's default.
        reference: a context in which the denoiser is the reference model, for ``reference_mean``.

    Raises:
        ValueError: unsupported pipeline class or scheduler, or a pipeline with a safety checker.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        parameters: Sequence[torch.nn.Parameter] | None = None,
        num_inference_steps: int = 50,
        step_kind: StepKind = "ancestral",
        eta: float = 1.0,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        resolution: int | None = None,
        reference: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.family = family_of(pipeline)
        if getattr(pipeline, "safety_checker", None) is not None:
            raise ValueError("Expected a pipeline without safety checker: load it with safety_checker=None.")
        self.pipeline = pipeline
        self.denoiser: torch.nn.Module = getattr(pipeline, self.family.denoiser)
        trainable = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        self.parameters: Sequence[torch.nn.Parameter] = list(parameters) if parameters is not None else trainable
        self.num_steps = num_inference_steps
        self.guidance_scale = self.family.default_guidance_scale if guidance_scale is None else guidance_scale
        self.negative_prompt = negative_prompt
        self.resolution = resolution
        self._reference = reference
        self.denoiser_evaluations = 0
        self.latents_dtype = torch.promote_types(self.denoiser.dtype, torch.float32)
        base = stochastic_scheduler(pipeline)
        self._scheduler = RecordingScheduler(base, diffusion_grid(base, num_inference_steps), step_kind, eta)
        self._encode_prompt = PromptMemory(pipeline.encode_prompt)
        self._dropout_seed = 0
        _cast_inputs_to_weights(self.denoiser)
        _cast_inputs_to_weights(pipeline.vae.decoder)
        if getattr(pipeline.vae, "post_quant_conv", None) is not None:
            _cast_inputs_to_weights(pipeline.vae.post_quant_conv)
        self.latents_shape = self._find_latents_shape()

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        return self._scheduler.std(t)

    def output_sensitivity(self, t: int) -> float:
        """``|d mean / d denoiser output|`` of step t."""
        return self._scheduler.output_sensitivity(t)

    def draw_noises(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal noises (T + 1, B, ...); a sample's depend on its seed alone, on every device.

        ``noises[T]``, the initial latents, equal those that the pipeline itself draws with a CPU generator of the seed.
        """
        samples = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            initial = torch.randn(1, *self.latents_shape, generator=generator)
            later = torch.randn(self.num_steps, *self.latents_shape, generator=generator)
            samples.append(torch.cat([later, initial]))
        return torch.stack(samples, dim=1).to(self.pipeline.device, self.latents_dtype)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], noises: torch.Tensor | None = None) -> Trajectory:
        """Samples the chain without a tape.

        Args:
            prompts: one per sample, length B.
            seeds: one per sample; sample i depends on ``seeds[i]`` alone.
            noises: use these instead of drawing them from the seeds, (T + 1, B, ...).
        """
        noises = self.draw_noises(seeds) if noises is None else noises
        initial = noises[self.num_steps]
        recorded = self._roll(list(prompts), initial, self.num_steps, 0, noises, dropout_seed=seeds[0])
        return Trajectory(
            prompts=list(prompts),
            latents=torch.stack([initial, *recorded.latents]).flip(0),
            noises=noises,
            stds=tuple(self.std(t) for t in range(1, self.num_steps + 1)),
            pred_original_samples=torch.stack([step.pred_original_sample for step in recorded.steps]).flip(0),
            dropout_seed=seeds[0],
        )

    def replay(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more, on the tape if gradients are enabled; from ``latents`` if given, else the stored x_t."""
        latents = trajectory.latents[t] if latents is None else latents
        self._scheduler.expose(t, t - 1, None)
        with self._seeded_dropout(trajectory.dropout_seed):
            self._call(trajectory.prompts, latents)
        self.denoiser_evaluations += trajectory.batch_size
        (step,), self._scheduler.recorded = self._scheduler.recorded.steps, RecordedSteps()
        return step

    @torch.no_grad()
    def reference_mean(self, trajectory: Trajectory, t: int) -> torch.Tensor:
        """The mean of step t, (B, ...), that the reference gives from the same x_t.

        Raises:
            RuntimeError: the chain was built without a reference.
        """
        if self._reference is None:
            raise RuntimeError("Expected a chain with a reference model; pass `reference` when building it.")
        with self._reference():
            return self.replay(trajectory, t).mean

    def rollout(
        self,
        trajectory: Trajectory,
        start: int,
        latents: torch.Tensor,
        stop: int = 0,
        noises: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs steps ``start, ..., stop + 1`` without a tape from x_start = ``latents``; returns x_stop, (B, ...)."""
        if start == stop:
            return latents
        noises = trajectory.noises if noises is None else noises
        recorded = self._roll(trajectory.prompts, latents, start, stop, noises, trajectory.dropout_seed)
        return recorded.latents[-1]

    def decode(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of clean latents (B, ...), on the tape if gradients are enabled."""
        self._scheduler.expose(0, 0, None)
        return self._call(list(prompts), latents, output_type="pt")

    @torch.no_grad()
    def _roll(
        self, prompts: list[str], latents: torch.Tensor, start: int, stop: int, noises: torch.Tensor, dropout_seed: int
    ) -> RecordedSteps:
        self._scheduler.expose(start, stop, noises)
        with self._seeded_dropout(dropout_seed):
            self._call(prompts, latents)
        self.denoiser_evaluations += len(prompts) * (start - stop)
        return self._scheduler.recorded

    def _call(self, prompts: list[str], latents: torch.Tensor | None, output_type: str = "latent") -> torch.Tensor:
        """The pipeline's undecorated ``__call__`` on the exposed slice."""
        arguments: dict[str, Any] = {"height": self.resolution, "width": self.resolution} if self.resolution else {}
        if self.negative_prompt is not None:
            arguments["negative_prompt"] = [self.negative_prompt] * len(prompts)
        undecorated_call: Callable[..., Any] = inspect.unwrap(type(self.pipeline).__call__)  # without its no_grad
        with self._driven_pipeline() as pipeline:
            output = undecorated_call(
                pipeline,
                prompt=prompts,
                num_inference_steps=self.num_steps,
                guidance_scale=self.guidance_scale,
                latents=latents,
                output_type=output_type,
                return_dict=False,
                **arguments,
            )
        return output[0]

    @contextmanager
    def _driven_pipeline(self) -> Iterator[DiffusionPipeline]:
        pipeline = self.pipeline
        scheduler, progress = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
        pipeline.scheduler, pipeline.encode_prompt = self._scheduler, self._encode_prompt
        pipeline.set_progress_bar_config(**{**progress, "disable": True})
        try:
            yield pipeline
        finally:
            pipeline.scheduler, pipeline._progress_bar_config = scheduler, progress
            del pipeline.encode_prompt

    @contextmanager
    def _seeded_dropout(self, seed: int) -> Iterator[None]:
        """Gives every step its own dropout masks, the same whenever the step is taken with the same seed."""
        if not self.denoiser.training:
            yield
            return
        devices = [self.pipeline.device] if self.pipeline.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self._scheduler.on_step = lambda t: torch.manual_seed(seed + t)
            try:
                yield
            finally:
                self._scheduler.on_step = None

    @torch.no_grad()
    def _find_latents_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents, asked of the pipeline itself: an empty slice returns its initial latents."""
        self._scheduler.expose(0, 0, None)
        with torch.random.fork_rng(devices=[]):
            return tuple(self._call([""], None).shape[1:])


class _InputCast:
    """Lets float32 latents enter a half-precision module; a forward pre-hook."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(map(self._cast, args)), {name: self._cast(value) for name, value in kwargs.items()}

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def _cast_inputs_to_weights(module: torch.nn.Module) -> None:
    """Adds the cast once, and only where weights are in half precision."""
    dtype = next(module.parameters()).dtype
    has_cast = any(isinstance(hook, _InputCast) for hook in module._forward_pre_hooks.values())
    if dtype in (torch.float16, torch.bfloat16) and not has_cast:
        module.register_forward_pre_hook(_InputCast(dtype), with_kwargs=True)
