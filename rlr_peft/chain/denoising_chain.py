"""Drives a diffusers pipeline as a chain of Gaussian steps, through the pipeline's own ``__call__``.

Sampling is the pipeline's call under ``no_grad``; replaying step t is the same call on a slice of one step, with a
tape; decoding is the same call on an empty slice. Guidance, conditioning and decoding are therefore exactly those of
inference, and nothing of a model family is written twice.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.chain.families import GENERIC, Family, explaining_unknown_class, family_of, first_frames, trained_module
from rlr_peft.chain.grid import SchedulerType, TimestepSpacing, base_scheduler
from rlr_peft.chain.memory import OffloadedTextEncoders, PromptMemory, cast_inputs_to_weights, working_device
from rlr_peft.chain.path import GaussianStep, StepKind
from rlr_peft.chain.scheduler import InferenceScheduler, RecordedSteps, RecordingScheduler
from rlr_peft.chain.trajectory import Trajectory
from rlr_peft.prompt import Prompt, PromptLike, as_prompts
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

    def encode(self, prompts: Sequence[PromptLike]) -> None:
        """Encodes prompts ahead of the calls that need them, which then find them remembered."""
        self._driven.initial_latents(as_prompts(prompts))

    def sample(
        self, prompts: Sequence[PromptLike], seeds: Sequence[int], noises: torch.Tensor | None = None
    ) -> Trajectory:
        """Samples the chain without a tape.

        Args:
            prompts: one per sample, length B; with stages a ``Prompt`` may bring one text for each of them.
            seeds: one per sample; sample i depends on ``seeds[i]`` alone.
            noises: use these instead of drawing them from the seeds, (T + 1, B, ...).

        Raises:
            ValueError: a prompt has another number of stage prompts than the chain has stages.
        """
        noises = self.draw_noises(seeds) if noises is None else noises
        initial, prompts = noises[self.num_steps], as_prompts(prompts)
        recorded = self._roll(prompts, initial, self.num_steps, 0, noises, dropout_seed=seeds[0])
        return Trajectory(
            prompts=prompts,
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

    def decode(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] of clean latents, on the tape if gradients are."""
        if self._first_frames is not None:
            latents = latents.narrow(self._first_frames.axis, 0, self._first_frames.latent_frames)
        frames = {} if self._first_frames is None else {"num_frames": self._first_frames.num_frames}
        return self._driven.decode(as_prompts(prompts), latents, **frames)

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
        self,
        prompts: list[Prompt],
        latents: torch.Tensor,
        start: int,
        stop: int,
        noises: torch.Tensor,
        dropout_seed: int,
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
        self._driven([Prompt("")], latents)
        shapes = [step.mean.shape for step in self._scheduler.recorded.steps]
        if shapes != [latents.shape]:
            raise ValueError(f"expected one step on latents {tuple(latents.shape)}, got {[tuple(s) for s in shapes]}")

    def _initial_latents(self, generator: torch.Generator) -> torch.Tensor:
        """x_T of one sample. Packed latents are drawn by the pipeline, which packs after drawing."""
        if len(self.latents_shape) > 2:
            return torch.randn(1, *self.latents_shape, generator=generator)
        return self._driven.initial_latents([Prompt("")], generator).cpu()


class DrivenPipeline:
    """Calls a pipeline on the slice of steps that its scheduler exposes.

    The pipeline is left as it was after every call: what is exchanged, is exchanged only meanwhile. (Half-precision
    denoisers and decoders keep a hook that casts their inputs.)

    Args:
        pipeline: a loaded pipeline.
        call: its undecorated call, with the options of the chain.
        scheduler: stands in for the pipeline's.
        device: where the models work.
        denoisers: attributes of the pipeline that hold what is trained.
        embeddings_dtype: of the prompts' embeddings; pipelines cast their latents to it.
        offload_text_encoders: keep the text encoders on the CPU but while new prompts are encoded.
        reward_decoder: decodes in place of the pipeline's VAE; None leaves the VAE.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        call: "PipelineCall",
        scheduler: RecordingScheduler,
        *,
        device: torch.device,
        denoisers: Sequence[str],
        embeddings_dtype: torch.dtype,
        offload_text_encoders: bool = False,
        reward_decoder: torch.nn.Module | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._call = call
        self._scheduler = scheduler
        self._device = device
        self._reward_decoder = reward_decoder
        self._offloaded = OffloadedTextEncoders(pipeline, device) if offload_text_encoders else None
        encode = pipeline.encode_prompt if self._offloaded is None else self._offloaded.encoding(pipeline.encode_prompt)
        self._encode_prompt = PromptMemory(encode, dtype=embeddings_dtype)
        for module in _denoisers_and_decoder(pipeline, denoisers, reward_decoder):
            cast_inputs_to_weights(module)

    def __call__(
        self, prompts: Sequence[Prompt], latents: torch.Tensor | None, output_type: str = "latent", **options: Any
    ) -> torch.Tensor:
        """What the pipeline's undecorated ``__call__`` returns of the exposed slice.

        Args:
            prompts: B texts.
            latents: where to start, (B, ...); None lets the pipeline draw noise.
            output_type: ``latent`` or ``pt``.
            options: of the call, over those of the chain.
        """
        with self._in_hand() as pipeline:
            return self._call(pipeline, list(prompts), latents, output_type, **options)

    @torch.no_grad()
    def initial_latents(self, prompts: Sequence[Prompt], generator: torch.Generator | None = None) -> torch.Tensor:
        """x_T as the pipeline itself draws it, (B, ...): an empty slice returns where it started.

        Without a generator the numbers are anything, and the global random state is left as it was.
        """
        devices = [self._device] if self._device.type == "cuda" else []
        options: dict[str, Any] = {} if generator is None else {"generator": generator}
        self._scheduler.expose(0, 0, None)
        with torch.random.fork_rng(devices, enabled=generator is None):
            return self(prompts, None, **options)

    def settle(self) -> tuple[int, ...]:
        """Shape of one sample's latents, asked of the pipeline itself, which thereby settles its grid.

        Raises:
            ValueError: the pipeline returns something else than one tensor of latents.
        """
        latents = self.initial_latents([Prompt("")])
        if not torch.is_tensor(latents) or latents.shape[0] != 1:
            raise ValueError('expected one tensor of latents (1, ...) for one prompt with output_type="latent"')
        return tuple(latents.shape[1:])

    def decode(self, prompts: Sequence[Prompt], latents: torch.Tensor, **options: Any) -> torch.Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] of clean latents, on the tape if gradients are."""
        self._scheduler.expose(0, 0, None)
        with self._reward_decoder_as_vae():
            return self(prompts, latents, output_type="pt", **options)

    @contextmanager
    def _in_hand(self) -> Iterator[DiffusionPipeline]:
        pipeline = self._pipeline
        scheduler, progress = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
        pipeline.scheduler, pipeline.encode_prompt = self._scheduler, self._encode_prompt
        pipeline.set_progress_bar_config(**{**progress, "disable": True})
        try:
            with nullcontext() if self._offloaded is None else self._offloaded.hidden():
                yield pipeline
        finally:
            pipeline.scheduler, pipeline._progress_bar_config = scheduler, progress
            del pipeline.encode_prompt

    @contextmanager
    def _reward_decoder_as_vae(self) -> Iterator[None]:
        if self._reward_decoder is None:
            yield
            return
        attributes = self._pipeline.__dict__  # past the pipeline's __setattr__, which would note it in its config
        vae, attributes["vae"] = attributes["vae"], self._reward_decoder
        try:
            yield
        finally:
            attributes["vae"] = vae


def _denoisers_and_decoder(
    pipeline: DiffusionPipeline, denoisers: Sequence[str], reward_decoder: Any
) -> Iterator[torch.nn.Module]:
    """Every module that latents enter: a second expert too that is not trained."""
    vae = getattr(pipeline, "vae", None)
    names = dict.fromkeys((*denoisers, "unet", "transformer", "transformer_2"))
    places = [(pipeline, name) for name in names]
    for owner, name in [*places, (vae, "decoder"), (vae, "post_quant_conv"), (reward_decoder, "decoder")]:
        module = getattr(owner, name, None)
        if isinstance(module, torch.nn.Module):
            yield module


DEFAULT_FPS = 8


class PipelineCall:
    """Calls a pipeline, undecorated, with the options of a chain.

    Args:
        pipeline: a loaded pipeline.
        family: its row.
        num_inference_steps: T.
        guidance_scale: the family's own guidance: classifier-free, or the number that a guidance-distilled model is
            told; None takes the pipeline's default.
        true_cfg_scale: classifier-free guidance of pipelines whose ``guidance_scale`` is distilled into the model.
        negative_prompt: what guidance steers away from.
        resolution: height and width in pixels, where these do not say otherwise.
        height: in pixels; None takes the resolution, else the pipeline's default.
        width: in pixels; None takes the resolution, else the pipeline's default.
        num_frames: of a video; None takes the pipeline's default.
        fps: frames per second, for models that are told; None takes the pipeline's default.
        max_sequence_length: of the tokenised prompt; None takes the pipeline's default.

    Attributes:
        guidance_scale: the scale in use; 1 if the pipeline has none.
        is_video: whether the pipeline makes videos.
        fps: frames per second of its videos.
        guidance: the guidance arguments as the pipeline spells them, for the card.
        card_options: what makes the pipeline draw the same without the chain, for the card.

    Raises:
        ValueError: an option that the pipeline does not take, or a pipeline that cannot be given prompts and latents.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family,
        *,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        resolution: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: int | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        self._name = type(pipeline).__name__
        self._undecorated: Callable[..., Any] = inspect.unwrap(type(pipeline).__call__)  # without its no_grad
        self.parameters = inspect.signature(self._undecorated).parameters
        for needed in ("prompt", "latents", "num_inference_steps", "output_type"):
            if needed not in self.parameters:
                raise ValueError(f"{self._name} cannot be driven as a chain: its call takes no `{needed}`.")
        self._num_inference_steps = num_inference_steps
        self.is_video = "num_frames" in self.parameters
        self.guidance = self._guidance(family, guidance_scale, true_cfg_scale)
        self.guidance_scale = float(self.guidance.get(family.guidance_argument, 1.0))
        self._options = self._checked(
            {
                "height": height or resolution,
                "width": width or resolution,
                "num_frames": num_frames,
                "max_sequence_length": max_sequence_length,
            }
        )
        frame_rate = self.parameters.get("frame_rate")
        if fps is not None and frame_rate is not None:
            self._options["frame_rate"] = fps
        self.fps: int = fps or (DEFAULT_FPS if frame_rate is None else frame_rate.default)
        if "use_resolution_binning" in self.parameters:  # it would resize the images after decoding
            self._options["use_resolution_binning"] = False
        self._negative_prompt = self._checked({"negative_prompt": negative_prompt}).get("negative_prompt")
        if self._negative_prompt is None and self.guidance.get("true_cfg_scale", 1.0) > 1:
            self._negative_prompt = " "  # without one these pipelines switch their guidance off
        negative = {} if self._negative_prompt is None else {"negative_prompt": self._negative_prompt}
        self.card_options: dict[str, Any] = {**self.guidance, **self._options, **negative}

    def __call__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[Prompt],
        latents: torch.Tensor | None,
        output_type: str,
        **options: Any,
    ) -> torch.Tensor:
        """What the pipeline returns first: latents, images (B, 3, H, W) or videos (B, F, 3, H, W).

        Args:
            pipeline: driven by the recording scheduler.
            prompts: B texts.
            latents: where to start; None lets the pipeline draw noise.
            output_type: ``latent`` or ``pt``.
            options: further arguments, over those of the chain.
        """
        arguments = self._options | self.guidance | options
        negative_prompts = self.negative_prompts(prompts)
        if negative_prompts is not None:
            arguments["negative_prompt"] = negative_prompts
        return self._undecorated(
            pipeline,
            prompt=[prompt.text for prompt in prompts],
            num_inference_steps=self._num_inference_steps,
            latents=latents,
            output_type=output_type,
            return_dict=False,
            **arguments,
        )[0]

    def negative_prompts(self, prompts: Sequence[Prompt]) -> list[str] | None:
        """What guidance steers away from, one text per prompt: the prompt's own, else the chain's; None for nothing.

        Raises:
            ValueError: prompts with negative ones of their own, and a pipeline that takes none.
        """
        own = [prompt.negative_prompt for prompt in prompts]
        if all(text is None for text in own):
            return None if self._negative_prompt is None else [self._negative_prompt] * len(prompts)
        if "negative_prompt" not in self.parameters:
            raise ValueError(f"{self._name} takes no negative_prompt: leave --negative_prompt_column out.")
        default = self._negative_prompt or ""
        return [default if text is None else text for text in own]

    def _guidance(self, family: Family, guidance_scale: float | None, true_cfg_scale: float | None) -> dict[str, float]:
        name = family.guidance_argument
        given = {"true_cfg_scale": true_cfg_scale}
        if guidance_scale is not None:
            if name == "true_cfg_scale" and true_cfg_scale is not None:
                raise ValueError(f"{self._name} has one guidance: give guidance_scale or true_cfg_scale, not both.")
            given[name] = guidance_scale
        guidance = self._checked(given)
        if name in self.parameters and name not in guidance:
            default = self.parameters[name].default
            if isinstance(default, (int, float)):
                guidance[name] = float(default)
        return guidance

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that were given; those that the pipeline does not take are refused."""
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in self.parameters:
                flag = "--resolution" if name in ("height", "width") else f"--{name}"
                raise ValueError(f"{self._name} takes no {name}: leave {flag} out.")
        return given


class StagePrompts:
    """Splits passes over the chain at the ends of its stages.

    Args:
        stages: None leaves the chain whole.
        num_steps: T.

    Raises:
        ValueError: a stage gets no step.
    """

    def __init__(self, stages: Stages | None, num_steps: int) -> None:
        self._steps = (range(num_steps, 0, -1),) if stages is None else stages.steps(num_steps)
        self._names = () if stages is None else stages.names

    def parts(self, prompts: Sequence[Prompt], start: int, stop: int) -> Iterator[tuple[int, int, list[Prompt]]]:
        """Runs of steps ``first, ..., last + 1`` that share their prompts, from ``start`` to ``stop``.

        Args:
            prompts: one per sample.
            start: first step taken.
            stop: the step after the last one taken.

        Yields:
            first, last, and one text per sample.

        Raises:
            ValueError: a prompt has another number of stage prompts than the chain has stages.
        """
        for index, steps in enumerate(self._steps):
            first, last = min(start, steps[0]), max(stop, steps[-1] - 1)
            if first > last:
                yield first, last, [self._text(prompt, index) for prompt in prompts]

    def at_step(self, prompts: Sequence[Prompt], t: int) -> list[Prompt]:
        """The texts that condition step t, one per sample."""
        ((_, _, texts),) = self.parts(prompts, t, t - 1)
        return texts

    def _text(self, prompt: Prompt, index: int) -> Prompt:
        """The prompt of a stage; one without stage prompts conditions all of them."""
        stages = prompt.stages
        if not stages:
            return prompt
        if len(stages) != len(self._names):
            expected = ", ".join(self._names) or "none: the chain was built without stages"
            raise ValueError(
                f"Expected stage prompts for {expected}; got {len(stages)} with the prompt {prompt.text!r}."
            )
        return Prompt(stages[index], prompt.negative_prompt)
