"""A diffusers pipeline as a chain of Gaussian steps, driven through the pipeline's own ``__call__``.

Sampling is the pipeline's call under ``no_grad``; replaying step t is the same call on a slice of one step, with a
tape; decoding is the same call on an empty slice. Guidance, conditioning and decoding are therefore exactly those of
inference, and nothing of a model family is written twice.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Self, TypeAlias

import torch
from diffusers import DiffusionPipeline

from rlr_peft.chain.families import GENERIC, explaining_unknown_class, family_of, first_frames
from rlr_peft.chain.grid import InferenceScheduler, base_scheduler, own_scheduler
from rlr_peft.chain.interface import Trajectory
from rlr_peft.chain.noise_window import moving_window
from rlr_peft.chain.path import GaussianStep, PathPoint
from rlr_peft.chain.pipeline import CallArguments, PipelineDriver
from rlr_peft.chain.scheduler import RecordedSteps, RecordingScheduler
from rlr_peft.chain.separate_samples import can_separate, separate_weights
from rlr_peft.config import ChainArguments
from rlr_peft.config.chain import StepKind
from rlr_peft.prompt import Prompt, PromptLike, Stages, as_prompts

StageForm: TypeAlias = Callable[[Prompt, int], Prompt]


class DenoisingChain:
    """A diffusers pipeline as a ``Chain``; see ``rlr_peft.chain.interface`` for the members shared with other chains.

    The pipeline is left as it was after every call: its scheduler and ``encode_prompt`` are exchanged only meanwhile.
    (A half-precision denoiser and decoder keep a hook that casts their inputs.)
    Latents stay in float32 (float64 if the denoiser is), whatever the precision of the denoiser.

    Args:
        pipeline: a loaded pipeline without safety checker; LoRA layers already attached if it is to be trained.
        arguments: steps, noise, guidance, sizes: the config's chain; None takes the defaults.
        parameters: what gradients are taken for; by default the denoiser's parameters that require grad.
        denoisers: attributes of the pipeline that hold what is trained; None takes the family's.
        decoded_frames: decode only so many first frames of a video; None decodes all.
        stages: splits the chain, so that every step is conditioned on the prompt of its stage; None for one prompt.
        stage_form: of a prompt with stage prompts and the number of a stage, the prompt that conditions it; None takes
            that stage's own.
        reward_decoder: decodes in place of the pipeline's VAE, such as an AutoencoderTiny; None leaves the VAE.
        detach_negative: take no gradient through the negative branch of guidance.
        reference: from the denoiser to a context in which it is the reference model.

    Attributes:
        pipeline: as given.
        arguments: as given.
        family: what is particular to the pipeline's class.
        device: where the models work.
        denoiser: what is trained; of a pipeline with several denoisers a ``ModuleDict`` of all.
        num_steps: T.
        moving_window: where noise is in which update; None where the same steps have it in all.
        denoiser_evaluations: of single samples so far; a guided pair counts once.
        reference: as given.
        latents_shape: shape of one sample's latents.
        latents_dtype: their precision.

    Raises:
        ValueError: a pipeline that cannot be driven, an option that it does not take, or one with a safety checker.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        arguments: ChainArguments | None = None,
        *,
        parameters: Sequence[torch.nn.Parameter] | None = None,
        denoisers: Sequence[str] | None = None,
        decoded_frames: int | None = None,
        stages: Stages | None = None,
        stage_form: StageForm | None = None,
        reward_decoder: torch.nn.Module | None = None,
        detach_negative: bool = False,
        reference: Callable[[torch.nn.Module], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.family = family_of(pipeline, denoisers)
        self._driver = PipelineDriver(pipeline, self.family, reward_decoder)
        self.device, self.latents_dtype = self._driver.device, self._driver.latents_dtype
        self.denoiser = self._driver.denoiser
        trainable = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        self.parameters: Sequence[torch.nn.Parameter] = trainable if parameters is None else list(parameters)
        self.reference = reference
        self._stages, self._stage_form = stages, stage_form
        self._decodes_for_rewards = True
        self._detach_negative = detach_negative
        self._first_frames = None
        self._own_scheduler: str | None = None
        self._arrange(ChainArguments() if arguments is None else arguments)
        with explaining_unknown_class(pipeline, self.family):
            self._try_step()
        if detach_negative:
            self._find_negative_branch()
        if decoded_frames is not None:
            self._first_frames = first_frames(pipeline, self.family, decoded_frames, self.latents_shape)

    def at(
        self,
        *,
        eta: float | None = None,
        step_kind: StepKind | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
        scheduler: str | None = None,
        whole: bool = False,
    ) -> Self:
        """Another chain over the same pipeline, which finds the prompts encoded that this one has encoded.

        Args:
            eta: amount of noise; None keeps it.
            step_kind: kind of denoising step; None keeps it.
            steps: T; None keeps it.
            guidance: the scale of the family's guidance; None keeps it.
            resolution: height and width in pixels; None keeps both.
            scheduler: what ``draw`` draws with: a scheduler of diffusers by its class name; None for the chain's steps.
            whole: draw and decode as the pipeline alone does, whole videos, with its own VAE and one eta for all steps:
                for images that are looked at.
        """
        two_scales = self.family.guidance_argument == "true_cfg_scale" and self.arguments.true_cfg_scale is not None
        given = {
            "eta": eta,
            "step_kind": step_kind,
            "num_inference_steps": steps,
            "true_cfg_scale" if two_scales else "guidance_scale": guidance,
        }
        changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if resolution is not None:
            changed |= {"resolution": resolution, "height": None, "width": None}
        chain = copy.copy(self)
        if whole:
            changed["noise_window"] = None
            chain._decodes_for_rewards, chain._first_frames, chain._detach_negative = False, None, False
        chain._arrange(replace(self.arguments, **changed))
        chain._own_scheduler = scheduler
        if scheduler is not None:
            own_scheduler(self.pipeline.scheduler, scheduler)  # raises where there is none
        return chain

    def place_noise(self, first: int, last: int) -> None:
        """From now on these steps have noise, and all others are deterministic."""
        self._scheduler.noise_window = first, last

    def _arrange(self, arguments: ChainArguments) -> None:
        """Takes up knobs: everything that depends on them, and nothing that chains over one pipeline share."""
        self.arguments = arguments
        self.num_steps = arguments.num_inference_steps
        self.denoiser_evaluations = 0
        self.moving_window = moving_window(arguments)
        whole = range(self.num_steps, 0, -1)
        self._steps_of_stages = (whole,) if self._stages is None else self._stages.steps(self.num_steps)
        self._call = CallArguments(self._driver, arguments)
        spacing = arguments.timestep_spacing or self.family.timestep_spacing
        base = base_scheduler(self.pipeline.scheduler, spacing, arguments.scheduler_type)
        self._scheduler = RecordingScheduler(base, arguments.step_kind, arguments.eta, spacing, arguments.noise_window)
        with explaining_unknown_class(self.pipeline, self.family):
            # Asked of the pipeline itself, which thereby settles its grid.
            latents = self._pipeline_latents([Prompt("")])
            if not torch.is_tensor(latents) or latents.shape[0] != 1:
                raise ValueError('expected one tensor of latents (1, ...) for one prompt with output_type="latent"')
            self.latents_shape = self._scheduler.latents_shape = tuple(latents.shape[1:])

    @property
    def mixes_samples(self) -> bool:
        return self.denoiser.training

    @property
    def reward_decoder(self) -> torch.nn.Module | None:
        """What decodes in place of the VAE; None for the VAE."""
        return self._driver.reward_decoder if self._decodes_for_rewards else None

    @property
    def solver(self) -> str:
        """What the chain's steps are without noise."""
        return "Euler" if self._scheduler.prediction_type == "flow_prediction" else "DDIM"

    @property
    def guidance_scale(self) -> float:
        """The guidance in use; 1 if the pipeline has none."""
        return self._call.guidance_scale

    @property
    def is_video(self) -> bool:
        """Whether the pipeline makes videos."""
        return self._driver.frames_argument is not None

    @property
    def fps(self) -> int:
        """Frames per second of the pipeline's videos."""
        return self._call.fps

    @property
    def call_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call with which it draws the same without the chain, but for the scheduler's."""
        return self._call.for_card

    @property
    def departures(self) -> tuple[str, ...]:
        return ("no gradient passes through the negative branch of guidance",) if self._detach_negative else ()

    def check_negative_prompts(self, prompts: Sequence[PromptLike]) -> None:
        """Raises a ValueError where prompts have negative ones of their own and the pipeline takes none."""
        self._call.negative_prompts(as_prompts(prompts))

    def check_images(self, prompts: Sequence[PromptLike]) -> None:
        """Raises a ValueError where a prompt has a picture that the pipeline does not take, or lacks one it needs."""
        self._driver.condition_images(as_prompts(prompts), self._call.of([], "latent"))

    def std(self, t: int) -> float:
        return self._scheduler.std(t)

    def output_sensitivity(self, t: int) -> float:
        return self._scheduler.output_sensitivity(t)

    def input_sensitivity(self, t: int) -> float:
        return self._scheduler.input_sensitivity(t)

    def prediction_sensitivity(self, t: int) -> float:
        return self._scheduler.prediction_sensitivity(t)

    def path_point(self, t: int) -> PathPoint:
        return self._scheduler.path_point(t)

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
        self._pipeline_latents(as_prompts(prompts))

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
        recorded = self._roll(prompts, initial, range(self.num_steps, 0, -1), noises, dropout_seed=seeds[0])
        return Trajectory(
            prompts=prompts,
            latents=torch.stack([initial, *recorded.latents]).flip(0),
            noises=noises,
            stds=tuple(self.std(t) for t in range(1, self.num_steps + 1)),
            pred_original_samples=torch.stack([step.pred_original_sample for step in recorded.steps]).flip(0),
            dropout_seed=seeds[0],
        )

    @torch.no_grad()
    def draw(self, prompts: Sequence[PromptLike], seeds: Sequence[int]) -> torch.Tensor:
        """Latents of images that are looked at, clean first and noise last, (N, B, ...); sample i by its seed alone.

        Those of ``sample``; or, with a scheduler that was named, the clean ones alone, (1, B, ...): what the pipeline
        draws with a CPU generator of the seed.
        """
        if self._own_scheduler is None:
            return self.sample(prompts, seeds).latents
        prompts, generators = as_prompts(prompts), [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments = {**self._call.of(prompts, "latent"), "generator": generators}
        scheduler = own_scheduler(self.pipeline.scheduler, self._own_scheduler)
        return self._driver(scheduler, prompts, None, arguments)[None]

    def replay(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        latents = trajectory.latents[t] if latents is None else latents
        ((_, prompts),) = self._conditioned(trajectory.prompts, range(t, t - 1, -1))
        self._scheduler.expose(t, t - 1, None)
        with self._seeded_dropout(trajectory.dropout_seed):
            self._drive(prompts, latents)
        self.denoiser_evaluations += trajectory.batch_size
        (step,), self._scheduler.recorded = self._scheduler.recorded.steps, RecordedSteps()
        return step

    @contextmanager
    def without_guidance(self) -> Iterator[None]:
        """Inside, steps are of the conditional prediction alone; guidance that is built into the model stays."""
        guided, self._call = self._call, self._call.without_guidance()
        try:
            yield
        finally:
            self._call = guided

    def separate_samples(self, count: int) -> AbstractContextManager[None] | None:
        """As the ``Chain`` has it.

        None with dropout, where other layers than LoRA's are trained or one call does not draw all samples, and of a
        class that no row knows: its layers may not keep the samples in order.
        """
        if self.mixes_samples or self.family.name == GENERIC.name or self.family.images_of_call != "any":
            return None
        if not can_separate(self.denoiser, self.parameters):
            return None
        return self._separated(count)

    @contextmanager
    def _separated(self, count: int) -> Iterator[None]:
        shared = self.parameters
        several = isinstance(self.denoiser, torch.nn.ModuleDict)
        models = list(self.denoiser.children()) if several else [self.denoiser]
        with separate_weights(models, shared, count) as self.parameters:
            try:
                yield
            finally:
                self.parameters = shared

    def replay_reference(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more by the reference, on the tape if gradients are enabled.

        Raises:
            RuntimeError: the chain was built without a reference.
        """
        if self.reference is None:
            raise RuntimeError("Expected a chain with a reference model; pass `reference` when building it.")
        with self.reference(self.denoiser):
            return self.replay(trajectory, t, latents)

    @torch.no_grad()
    def reference_mean(self, trajectory: Trajectory, t: int) -> torch.Tensor:
        return self.replay_reference(trajectory, t).mean

    def rollout(
        self,
        trajectory: Trajectory,
        start: int,
        latents: torch.Tensor,
        stop: int = 0,
        noises: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if start == stop:
            return latents
        noises = trajectory.noises if noises is None else noises
        steps = range(start, stop, -1)
        return self._roll(trajectory.prompts, latents, steps, noises, trajectory.dropout_seed).latents[-1]

    def decode(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1] of clean latents, on the tape if gradients are."""
        frames = {}
        if self._first_frames is not None:
            latents = latents.narrow(self._first_frames.axis, 0, self._first_frames.latent_frames)
            frames = {"num_frames": self._first_frames.num_frames}
        self._scheduler.expose(0, 0, None)
        with self._driver.decoding_for_rewards() if self._decodes_for_rewards else nullcontext():
            return self._drive(as_prompts(prompts), latents, output_type="pt", **frames)

    def inference_scheduler(self) -> InferenceScheduler:
        """The diffusers scheduler with which the pipeline alone draws what this chain draws, or comes nearest to it."""
        if self._own_scheduler is not None:
            return InferenceScheduler(self._own_scheduler, {}, {})
        return self._scheduler.for_inference(self.pipeline.scheduler.config, self._driver.parameters)

    def sampling_in_words(self) -> str:
        """What images of this chain are drawn with: steps, scheduler, eta and guidance."""
        if self._own_scheduler is not None:
            return f"{self.num_steps} steps of {self._own_scheduler} and guidance scale {self.guidance_scale:g}"
        is_noisy = any(self.std(t) > 0 for t in range(1, self.num_steps + 1))
        kind = self._scheduler.kind if is_noisy else self.solver
        return (
            f"{self.num_steps} {kind} steps ({self.inference_scheduler()}), "
            f"eta {self._scheduler.eta:g} and guidance scale {self.guidance_scale:g}"
        )

    def last_step_warning(self) -> str | None:
        """A sentence if the last step hardly moves the image, so that most first-order gradients vanish there."""
        return self._scheduler.last_step_warning()

    def _drive(
        self, prompts: Sequence[Prompt], latents: torch.Tensor | None, output_type: str = "latent", **options: Any
    ) -> torch.Tensor:
        """What the pipeline's own call returns for the steps that the scheduler exposes."""
        arguments = self._call.of(prompts, output_type, **options)
        return self._driver(self._scheduler, prompts, latents, arguments, self._detach_negative)

    @torch.no_grad()
    def _roll(
        self, prompts: list[Prompt], latents: torch.Tensor, steps: range, noises: torch.Tensor, dropout_seed: int
    ) -> RecordedSteps:
        recorded = RecordedSteps()
        for part, conditions in self._conditioned(prompts, steps):
            self._scheduler.expose(part.start, part.stop, noises)
            with self._seeded_dropout(dropout_seed):
                self._drive(conditions, latents)
            recorded.extend(self._scheduler.recorded)
            latents = recorded.latents[-1]
        self.denoiser_evaluations += len(prompts) * len(steps)
        return recorded

    def _conditioned(self, prompts: Sequence[Prompt], steps: range) -> Iterator[tuple[range, list[Prompt]]]:
        """The runs of steps within ``steps``, noise first, that share their prompts, with one prompt per sample."""
        for index, of_stage in enumerate(self._steps_of_stages):
            part = range(min(steps.start, of_stage.start), max(steps.stop, of_stage.stop), -1)
            if part:
                yield part, [self._prompt_of_stage(prompt, index) for prompt in prompts]

    def _prompt_of_stage(self, prompt: Prompt, index: int) -> Prompt:
        """The prompt that conditions a stage; one without stage prompts conditions all of them."""
        if not prompt.stages:
            return prompt
        names = () if self._stages is None else self._stages.names
        if len(prompt.stages) != len(names):
            expected = ", ".join(names) or "none: the chain was built without stages"
            raise ValueError(
                f"Expected stage prompts for {expected}; got {len(prompt.stages)} with the prompt {prompt.text!r}."
            )
        if self._stage_form is None:
            return replace(prompt, text=prompt.stages[index], stages=())
        own = self.arguments.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
        return self._stage_form(replace(prompt, negative_prompt=own), index)

    @contextmanager
    def _seeded_dropout(self, seed: int) -> Iterator[None]:
        """Gives every step its own dropout masks, the same whenever the step is taken with the same seed."""
        if not self.denoiser.training:
            yield
            return
        with torch.random.fork_rng(devices=self._cuda_devices()):
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
        latents = self._take_first_step()
        shapes = [step.mean.shape for step in self._scheduler.recorded.steps]
        if shapes != [latents.shape]:
            raise ValueError(f"expected one step on latents {tuple(latents.shape)}, got {[tuple(s) for s in shapes]}")

    def _find_negative_branch(self) -> None:
        """One step must have one that can be detached.

        Raises:
            ValueError: it has none.
        """
        branch = self._driver.negative_branch
        if branch is None:
            raise ValueError(
                f"detach_negative: expected a supported pipeline, got {self._driver.name}, where it is not known which "
                "calls are the negative branch of guidance; leave --detach_negative out."
            )
        self._take_first_step()
        if not branch.ran:
            raise ValueError(
                f"detach_negative: expected guidance with a negative branch, got {self._driver.name} at scale "
                f"{self.guidance_scale:g} without one: it is off, or built into the model. Raise --guidance_scale or "
                "--true_cfg_scale, or leave --detach_negative out."
            )

    @torch.no_grad()
    def _take_first_step(self) -> torch.Tensor:
        """The latents (1, ...), all zero, from which one step was taken, which is recorded."""
        latents = torch.zeros(1, *self.latents_shape, dtype=self.latents_dtype, device=self.device)
        self._scheduler.expose(self.num_steps, self.num_steps - 1, None)
        self._drive([Prompt("")], latents)
        return latents

    def _initial_latents(self, generator: torch.Generator) -> torch.Tensor:
        """x_T of one sample. The pipeline draws packed latents, which it packs after drawing, and those of an unknown
        class, which it may scale."""
        if len(self.latents_shape) > 2 and self.family.name != GENERIC.name:
            return torch.randn(1, *self.latents_shape, generator=generator)
        return self._pipeline_latents([Prompt("")], generator).cpu()

    @torch.no_grad()
    def _pipeline_latents(self, prompts: Sequence[Prompt], generator: torch.Generator | None = None) -> torch.Tensor:
        """x_T as the pipeline itself draws it, (B, ...): an empty slice returns where it started.

        Without a generator the numbers are anything, and the global random state is left as it was.
        """
        options: dict[str, Any] = {} if generator is None else {"generator": generator}
        self._scheduler.expose(0, 0, None)
        with torch.random.fork_rng(self._cuda_devices(), enabled=generator is None):
            returned = self._drive(prompts, None, **options)
        made = self._driver.prepared
        return returned if made is None or made.ndim == returned.ndim else made  # FLUX.2 unpacks what it returns

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []
