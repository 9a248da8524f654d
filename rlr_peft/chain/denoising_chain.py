"""A diffusers pipeline as a chain of Gaussian steps: samples of it, and each of their steps once more.

Sampling is the pipeline's call under ``no_grad``; replaying step t is the same call on a slice of one step, with a
tape; decoding is the same call on an empty slice. Guidance, conditioning and decoding are therefore exactly those of
inference, and nothing of a model family is written twice.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Self, TypeAlias

import torch
from diffusers import DiffusionPipeline

from rlr_peft.chain.denoiser_forwards import can_separate, separate_weights
from rlr_peft.chain.families import GENERIC
from rlr_peft.chain.grid import InferenceScheduler, own_scheduler
from rlr_peft.chain.scheduler import RecordedSteps
from rlr_peft.chain.stepped_pipeline import SteppedPipeline
from rlr_peft.chain.steps import GaussianStep, Trajectory
from rlr_peft.config import ChainArguments
from rlr_peft.config.chain import StepKind
from rlr_peft.prompt import Prompt, PromptLike, Stages, as_prompts

StageForm: TypeAlias = Callable[[Prompt, int], Prompt]


class DenoisingChain(SteppedPipeline):
    """A diffusers pipeline as a ``Chain``; see ``rlr_peft.chain.steps`` for the members shared with other chains.

    Args:
        pipeline, denoisers, decoded_frames, reward_decoder, detach_negative: see ``SteppedPipeline``; LoRA layers are
            attached already if it is to be trained.
        arguments: steps, noise, guidance, sizes: the config's chain; None takes the defaults.
        parameters: what gradients are taken for; by default the denoiser's parameters that require grad.
        stages: splits the chain, so that every step is conditioned on the prompt of its stage; None for one prompt.
        stage_form: of a prompt with stage prompts and the number of a stage, the prompt that conditions it; None takes
            that stage's own.
        reference: from the denoiser to a context in which it is the reference model.

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
        self._stages, self._stage_form = stages, stage_form
        knobs = ChainArguments() if arguments is None else arguments
        super().__init__(pipeline, knobs, denoisers, decoded_frames, reward_decoder, detach_negative)
        trainable = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        self.parameters: Sequence[torch.nn.Parameter] = trainable if parameters is None else list(parameters)
        self.reference = reference
        self._own_scheduler: str | None = None

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
        if scheduler is not None and self.family.has_sound:
            raise ValueError(
                f"{type(self.pipeline).__name__} returns a video's latents without those of its sound, which stay here "
                "with the chain's own steps: leave --evaluation_scheduler out."
            )
        if scheduler is not None:
            own_scheduler(self.pipeline.scheduler, scheduler)  # raises where there is none
        return chain

    def _arrange(self, arguments: ChainArguments) -> None:
        whole, num_steps = range(arguments.num_inference_steps, 0, -1), arguments.num_inference_steps
        self._steps_of_stages = (whole,) if self._stages is None else self._stages.steps(num_steps)
        super()._arrange(arguments)

    @property
    def _models(self) -> list[torch.nn.Module]:
        """The denoiser, or those that share out the steps."""
        several = isinstance(self.denoiser, torch.nn.ModuleDict)
        return list(self.denoiser.children()) if several else [self.denoiser]

    @property
    def trained_models(self) -> int:
        trained = set(map(id, self.parameters))
        return sum(any(id(parameter) in trained for parameter in model.parameters()) for model in self._models)

    @property
    def mixes_samples(self) -> bool:
        return self.denoiser.training

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

    def inference_scheduler(self) -> InferenceScheduler:
        return super().inference_scheduler() if self._own_scheduler is None else InferenceScheduler(self._own_scheduler)

    def sampling_in_words(self) -> str:
        if self._own_scheduler is None:
            return super().sampling_in_words()
        return f"{self.num_steps} steps of {self._own_scheduler} and guidance scale {self.guidance_scale:g}"

    def replay(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        latents = trajectory.latents[t] if latents is None else latents
        ((_, prompts),) = self._conditioned(trajectory.prompts, range(t, t - 1, -1))
        self._scheduler.expose(t, t - 1, None)
        with self._seeded_dropout(trajectory.dropout_seed):
            self._drive(prompts, latents)
        self.denoiser_evaluations += trajectory.batch_size
        (step,), self._scheduler.recorded = self._scheduler.recorded.steps, RecordedSteps()
        return step

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
        with separate_weights(self._models, shared, count) as self.parameters:
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

    def denoise(
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
                yield part, [self.prompt_of_stage(prompt, index) for prompt in prompts]

    def prompt_of_stage(self, prompt: Prompt, index: int) -> Prompt:
        """The prompt that conditions a stage, with all that guidance leads away from there.

        Args:
            prompt: one without stage prompts conditions all stages.
            index: of the stage, noise first.
        """
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

    def _initial_latents(self, generator: torch.Generator) -> torch.Tensor:
        """x_T of one sample. The pipeline draws packed latents, which it packs after drawing, and those of an unknown
        class, which it may scale."""
        if len(self.latents_shape) > 2 and self.family.name != GENERIC.name:
            return torch.randn(1, *self.latents_shape, generator=generator)
        return self._pipeline_latents([Prompt("")], generator).cpu()
