"""Drives a diffusers pipeline as a chain of Gaussian steps, through the pipeline's own ``__call__``.

Sampling is the pipeline's call under ``no_grad``; replaying step t is the same call on a slice of one step, with a
tape; decoding is the same call on an empty slice. Guidance, conditioning and decoding are therefore exactly those of
inference, and nothing of a model family is written twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.chain.driven_pipeline import DrivenPipeline
from rlr_peft.chain.families import GENERIC, explaining_unknown_class, family_of, trained_module
from rlr_peft.chain.first_frames import first_frames
from rlr_peft.chain.gaussian_step import GaussianStep, StepKind
from rlr_peft.chain.grids import SchedulerType, TimestepSpacing, base_scheduler
from rlr_peft.chain.inference_scheduler import InferenceScheduler
from rlr_peft.chain.offload import working_device
from rlr_peft.chain.pipeline_call import PipelineCall
from rlr_peft.chain.recording_scheduler import RecordedSteps, RecordingScheduler
from rlr_peft.chain.stage_prompts import StagePrompts
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.stages import Stages


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
        eta: amount of noise, at least 0, and at most 1 except for ``flow-sde``.
        timestep_spacing: where the T steps lie on the noising path; None takes the family's.
        scheduler_type: the kind of noising path; None reads it off the pipeline's scheduler.
        denoisers: attributes of the pipeline that hold what is trained; None takes the family's.
        decoded_frames: decode only so many first frames of a video; None decodes all.
        stages: splits the chain, so that every step is conditioned on the prompt of its stage; None for one prompt.
        offload_text_encoders: keep the text encoders on the CPU but while new prompts are encoded.
        reward_decoder: decodes in place of the pipeline's VAE, such as an AutoencoderTiny; None leaves the VAE.
        reference: a context in which the denoiser is the reference model, for ``reference_mean``.
        options: of ``PipelineCall``: guidance_scale, negative_prompt, height, width, num_frames and more.

    Attributes:
        family: what is particular to the pipeline's class.
        device: where the models work.
        denoiser: what is trained; of a pipeline with several denoisers a ``ModuleDict`` of all.
        call: the pipeline's call with its options.
        reward_decoder: what decodes in place of the VAE; None for the VAE.
        latents_shape: shape of one sample's latents.
        latents_dtype: their precision.

    Raises:
        ValueError: a pipeline that cannot be driven, an option that it does not take, or one with a safety checker.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        parameters: Sequence[torch.nn.Parameter] | None = None,
        num_inference_steps: int = 50,
        step_kind: StepKind = "ancestral",
        eta: float = 1.0,
        timestep_spacing: TimestepSpacing | None = None,
        scheduler_type: SchedulerType | None = None,
        denoisers: Sequence[str] | None = None,
        decoded_frames: int | None = None,
        stages: Stages | None = None,
        offload_text_encoders: bool = False,
        reward_decoder: torch.nn.Module | None = None,
        reference: Callable[[], AbstractContextManager[None]] | None = None,
        **options: Any,
    ) -> None:
        self.family = family_of(pipeline, denoisers)
        if getattr(pipeline, "safety_checker", None) is not None:
            raise ValueError("Expected a pipeline without safety checker: load it with safety_checker=None.")
        self.pipeline = pipeline
        self.device = working_device(getattr(pipeline, self.family.denoisers[0]))
        self.reward_decoder = reward_decoder
        self.denoiser = trained_module(pipeline, self.family.denoisers)
        trainable = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        self.parameters: Sequence[torch.nn.Parameter] = list(parameters) if parameters is not None else trainable
        self.num_steps = num_inference_steps
        self._stage_prompts = StagePrompts(stages, num_inference_steps)
        self.call = PipelineCall(pipeline, self.family, num_inference_steps=num_inference_steps, **options)
        self._reference = reference
        self.denoiser_evaluations = 0
        weights = getattr(pipeline, self.family.denoisers[0])
        self.latents_dtype = torch.promote_types(weights.dtype, torch.float32)
        spacing = timestep_spacing or self.family.timestep_spacing
        base = base_scheduler(pipeline.scheduler, spacing, scheduler_type)
        self._scheduler = RecordingScheduler(base, step_kind, eta, spacing)
        self._driven = DrivenPipeline(
            pipeline,
            self.call,
            self._scheduler,
            device=self.device,
            denoisers=self.family.denoisers,
            embeddings_dtype=self.latents_dtype,
            offload_text_encoders=offload_text_encoders,
            reward_decoder=reward_decoder,
        )
        with explaining_unknown_class(pipeline, self.family):
            self.latents_shape = self._scheduler.latents_shape = self._driven.settle()
            self._try_step()
        self._first_frames = (
            None if decoded_frames is None else first_frames(pipeline, self.family, decoded_frames, self.latents_shape)
        )

    @property
    def solver(self) -> str:
        """What the chain's steps are without noise."""
        return "Euler" if self._scheduler.prediction_type == "flow_prediction" else "DDIM"

    @property
    def guidance_scale(self) -> float:
        """The guidance in use."""
        return self.call.guidance_scale

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
            initial = self._initial_latents(generator)
            later = torch.randn(self.num_steps, *self.latents_shape, generator=generator)
            samples.append(torch.cat([later, initial]))
        return torch.stack(samples, dim=1).to(self.device, self.latents_dtype)

    def encode(self, prompts: Sequence[str]) -> None:
        """Encodes prompts ahead of the calls that need them, which then find them remembered."""
        self._driven.initial_latents(prompts)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], noises: torch.Tensor | None = None) -> Trajectory:
        """Samples the chain without a tape.

        Args:
            prompts: one per sample, length B; with stages a ``Prompt`` may bring one text for each of them.
            seeds: one per sample; sample i depends on ``seeds[i]`` alone.
            noises: use these instead of drawing them from the seeds, (T + 1, B, ...).

        Raises:
            ValueError: a prompt has another number of stage prompts than the chain has stages.
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
            self._driven(self._stage_prompts.at_step(trajectory.prompts, t), latents)
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
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] of clean latents, on the tape if gradients are."""
        if self._first_frames is not None:
            latents = latents.narrow(self._first_frames.axis, 0, self._first_frames.latent_frames)
        frames = {} if self._first_frames is None else {"num_frames": self._first_frames.num_frames}
        return self._driven.decode(prompts, latents, **frames)

    def inference_scheduler(self) -> InferenceScheduler:
        """The diffusers scheduler with which the pipeline alone draws what this chain draws, or comes nearest to it."""
        return self._scheduler.for_inference(self.pipeline.scheduler.config, self.call.parameters)

    def sampling_in_words(self) -> str:
        """What images of this chain are drawn with: steps, scheduler, eta and guidance."""
        is_noisy = any(self.std(t) > 0 for t in range(1, self.num_steps + 1))
        kind = self._scheduler.kind if is_noisy else self.solver
        return (
            f"{self.num_steps} {kind} steps ({self.inference_scheduler()}), "
            f"eta {self._scheduler.eta:g} and guidance scale {self.guidance_scale:g}"
        )

    def last_step_warning(self) -> str | None:
        """A sentence if the last step hardly moves the image, so that most first-order gradients vanish there."""
        return self._scheduler.last_step_warning()

    @torch.no_grad()
    def _roll(
        self, prompts: list[str], latents: torch.Tensor, start: int, stop: int, noises: torch.Tensor, dropout_seed: int
    ) -> RecordedSteps:
        recorded = RecordedSteps()
        for first, last, texts in self._stage_prompts.parts(prompts, start, stop):
            self._scheduler.expose(first, last, noises)
            with self._seeded_dropout(dropout_seed):
                self._driven(texts, latents)
            recorded.extend(self._scheduler.recorded)
            latents = recorded.latents[-1]
        self.denoiser_evaluations += len(prompts) * (start - stop)
        return recorded

    @contextmanager
    def _seeded_dropout(self, seed: int) -> Iterator[None]:
        """Gives every step its own dropout masks, the same whenever the step is taken with the same seed."""
        if not self.denoiser.training:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self._scheduler.on_step = lambda t: torch.manual_seed(seed + t)
            try:
                yield
            finally:
                self._scheduler.on_step = None

    @torch.no_grad()
    def _try_step(self) -> None:
        """Of a class that no row knows: one step must come out as the chain expects it."""
        if self.family.name != GENERIC.name:
            return
        latents = torch.zeros(1, *self.latents_shape, dtype=self.latents_dtype, device=self.device)
        self._scheduler.expose(self.num_steps, self.num_steps - 1, None)
        self._driven([""], latents)
        shapes = [step.mean.shape for step in self._scheduler.recorded.steps]
        if shapes != [latents.shape]:
            raise ValueError(f"expected one step on latents {tuple(latents.shape)}, got {[tuple(s) for s in shapes]}")

    def _initial_latents(self, generator: torch.Generator) -> torch.Tensor:
        """x_T of one sample. Packed latents are drawn by the pipeline, which packs after drawing."""
        if len(self.latents_shape) > 2:
            return torch.randn(1, *self.latents_shape, generator=generator)
        return self._driven.initial_latents([""], generator).cpu()
