"""A pipeline that takes the steps which a chain asks for: its calls on slices of the grid, and what they are given."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlr_peft.chain.families import (
    GENERIC,
    NEED_NEGATIVE_PROMPT,
    explaining_unknown_class,
    family_of,
    first_frames,
)
from rlr_peft.chain.grid import InferenceScheduler, base_scheduler
from rlr_peft.chain.pipeline import PipelineDriver
from rlr_peft.chain.scheduler import RecordingScheduler
from rlr_peft.chain.steps import PathPoint
from rlr_peft.config import ChainArguments
from rlr_peft.prompt import Prompt, PromptLike, as_prompts

DEFAULT_FPS = 8

# Knobs that say how the chain steps; all others are arguments of the pipeline's call, by the same name.
STEPPING = {
    *("num_inference_steps", "step_kind", "eta", "timestep_spacing", "scheduler_type"),
    *("noise_window", "noise_steps", "noise_slide"),
}
# Knobs that become arguments of another name, or only of some prompts.
TRANSLATED = {"guidance_scale", "true_cfg_scale", "resolution", "fps", "negative_prompt"}


class SteppedPipeline:
    """A pipeline that takes any run of steps of its grid, driven through its own ``__call__``.

    The pipeline is left as it was after every call: its scheduler and ``encode_prompt`` are exchanged only meanwhile.
    (A half-precision denoiser and decoder keep a hook that casts their inputs.)
    Latents stay in float32 (float64 if the denoiser is), whatever the precision of the denoiser.

    Args:
        pipeline: loaded without safety checker.
        denoisers: attributes of the pipeline that hold what is trained; None takes the family's.
        decoded_frames: decode only so many first frames of a video; None decodes all.
        reward_decoder: decodes in place of the pipeline's VAE, such as an AutoencoderTiny; None leaves the VAE.
        detach_negative: take no gradient through the negative branch of guidance.

    Attributes:
        family: what is particular to the pipeline's class.
        device: where the models work.
        denoiser: what is trained; of a pipeline with several denoisers a ``ModuleDict`` of all.
        num_steps: T.
        denoiser_evaluations: of single samples so far; a guided pair counts once.
        latents_shape: shape of one sample's latents.
        latents_dtype: their precision.

    Raises:
        ValueError: a pipeline that cannot be driven, an option that it does not take, or one with a safety checker.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        arguments: ChainArguments,
        denoisers: Sequence[str] | None,
        decoded_frames: int | None,
        reward_decoder: torch.nn.Module | None,
        detach_negative: bool,
    ) -> None:
        self.pipeline = pipeline
        self.family = family_of(pipeline, denoisers)
        self._driver = PipelineDriver(pipeline, self.family, reward_decoder)
        self.device, self.latents_dtype = self._driver.device, self._driver.latents_dtype
        self.denoiser = self._driver.denoiser
        self._decodes_for_rewards = True
        self._detach_negative = detach_negative
        self._first_frames = None
        self._arrange(arguments)
        with explaining_unknown_class(pipeline, self.family):
            self._try_step()
        if detach_negative:
            self._find_negative_branch()
        if decoded_frames is not None:
            self._first_frames = first_frames(pipeline, self.family, decoded_frames, self.latents_shape)

    def _arrange(self, arguments: ChainArguments) -> None:
        """Takes up knobs: everything that depends on them, and nothing that chains over one pipeline share."""
        self.arguments = arguments
        self.num_steps = arguments.num_inference_steps
        self.denoiser_evaluations = 0
        self._call = CallArguments(self._driver, arguments)
        spacing = arguments.timestep_spacing or self.family.timestep_spacing
        base = base_scheduler(self.pipeline.scheduler, spacing, arguments.scheduler_type)
        kind, eta, window = arguments.kind_of_steps, arguments.eta, arguments.noise_window
        self._scheduler = RecordingScheduler(base, kind, eta, spacing, window)
        with explaining_unknown_class(self.pipeline, self.family):
            # Asked of the pipeline itself, which thereby settles its grid.
            latents = self._pipeline_latents([Prompt("")])
            if not torch.is_tensor(latents) or latents.shape[0] != 1:
                raise ValueError('expected one tensor of latents (1, ...) for one prompt with output_type="latent"')
            self.latents_shape = self._scheduler.latents_shape = tuple(latents.shape[1:])

    def place_noise(self, first: int, last: int) -> None:
        """From now on these steps have noise, and all others are deterministic."""
        self._scheduler.noise_window = first, last

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

    def encode(self, prompts: Sequence[PromptLike]) -> None:
        """Encodes prompts ahead of the calls that need them, which then find them remembered."""
        self._pipeline_latents(as_prompts(prompts))

    @contextmanager
    def without_guidance(self) -> Iterator[None]:
        """Inside, steps are of the conditional prediction alone; guidance that is built into the model stays."""
        guided, self._call = self._call, self._call.without_guidance()
        try:
            yield
        finally:
            self._call = guided

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
        return self._scheduler.for_inference(self.pipeline.scheduler.config, self._driver.parameters)

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

    def _drive(
        self, prompts: Sequence[Prompt], latents: torch.Tensor | None, output_type: str = "latent", **options: Any
    ) -> torch.Tensor:
        """What the pipeline's own call returns for the steps that the scheduler exposes."""
        arguments = self._call.of(prompts, output_type, **options)
        return self._driver(self._scheduler, prompts, latents, arguments, self._detach_negative)

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


class CallArguments:
    """The arguments of a pipeline's call that the knobs of a chain ask for.

    Attributes:
        guidance: the guidance arguments as the pipeline spells them.
        guidance_scale: the scale in use; 1 if the pipeline has none.
        fps: frames per second of the pipeline's videos.
        for_card: what makes the pipeline draw the same without the chain.

    Raises:
        ValueError: an option that the pipeline does not take.
    """

    def __init__(self, driver: PipelineDriver, knobs: ChainArguments) -> None:
        self._name, self._parameters = driver.name, driver.parameters
        self._guidance_argument, self._no_guidance = driver.family.guidance_argument, driver.family.no_guidance
        self.guidance = self._guidance(driver.family.guidance_argument, knobs)
        self.guidance_scale = float(self.guidance.get(driver.family.guidance_argument, 1.0))
        if knobs.num_frames is None and getattr(driver.pipeline, "duration_head", None) is not None:
            raise ValueError(f"{self._name} would choose another length for every prompt: give --num_frames.")
        self._off = {self._steering_argument: self._no_guidance, **dict(driver.family.other_guidance)}
        if self.guidance_scale <= self._no_guidance:
            self.guidance |= dict(driver.family.other_guidance)
        own = {name: value for name, value in vars(knobs).items() if name not in STEPPING | TRANSLATED}
        own[driver.frames_argument or "num_frames"] = own.pop("num_frames")
        own |= {"height": knobs.height or knobs.resolution, "width": knobs.width or knobs.resolution}
        options = self._checked(own)
        frame_rate = self._parameters.get("frame_rate")
        if knobs.fps is not None and frame_rate is not None:
            options["frame_rate"] = knobs.fps
        self.fps: int = knobs.fps or (DEFAULT_FPS if frame_rate is None else frame_rate.default)
        if "max_area" in self._parameters and {"height", "width"} <= options.keys():
            # FLUX Kontext would scale what it draws, and what it draws from, to a million pixels
            options |= {"max_area": options["height"] * options["width"], "_auto_resize": False}
        if "use_resolution_binning" in self._parameters:  # it would resize the images after decoding
            options["use_resolution_binning"] = False
        self._negative_prompt = self._checked({"negative_prompt": knobs.negative_prompt}).get("negative_prompt")
        if self._negative_prompt is None and self.guidance.get("true_cfg_scale", 1.0) > 1:
            self._negative_prompt = " "  # without one these pipelines switch their guidance off
        if self._negative_prompt is None and self._name in NEED_NEGATIVE_PROMPT:
            self._negative_prompt = ""
        negative = {} if self._negative_prompt is None else {"negative_prompt": self._negative_prompt}
        self.for_card: dict[str, Any] = {**self.guidance, **options, **negative}
        self._fixed = {"num_inference_steps": knobs.num_inference_steps, **options, **self.guidance}

    def of(self, prompts: Sequence[Prompt], output_type: str, **options: Any) -> dict[str, Any]:
        """All arguments but prompts and latents of a call; ``output_type`` is ``latent`` or ``pt``."""
        negative = self.negative_prompts(prompts)
        given = {} if negative is None else {"negative_prompt": negative}
        return {**self._fixed, **options, **given, "output_type": output_type}

    def without_guidance(self) -> "CallArguments":
        """The same call with guidance off; a scale that is built into the model stays."""
        unguided = copy.copy(self)
        if self._steering_argument in self._parameters:
            unguided._fixed, unguided._negative_prompt = {**self._fixed, **self._off}, None
        return unguided

    @property
    def steers(self) -> bool:
        """Whether guidance leads away from a text: not where it is off, built into the model, or takes no text."""
        name = self._steering_argument
        if name not in self._parameters or "negative_prompt" not in self._parameters:
            return False
        scale = self._fixed.get(name, self._parameters[name].default)
        return isinstance(scale, (int, float)) and scale > self._no_guidance

    @property
    def _steering_argument(self) -> str:
        return "true_cfg_scale" if "true_cfg_scale" in self._parameters else self._guidance_argument

    def negative_prompts(self, prompts: Sequence[Prompt]) -> list[str] | None:
        """What guidance steers away from, one text per prompt: the prompt's own, else the chain's; None for nothing.

        Raises:
            ValueError: prompts with negative ones of their own, and a pipeline that takes none.
        """
        own = [prompt.negative_prompt for prompt in prompts]
        if all(text is None for text in own):
            return None if self._negative_prompt is None else [self._negative_prompt] * len(prompts)
        if "negative_prompt" not in self._parameters:
            raise ValueError(f"{self._name} takes no negative_prompt: leave --negative_prompt_column out.")
        default = self._negative_prompt or ""
        return [default if text is None else text for text in own]

    def _guidance(self, name: str, knobs: ChainArguments) -> dict[str, float]:
        given = {"true_cfg_scale": knobs.true_cfg_scale}
        if knobs.guidance_scale is not None:
            if name == "true_cfg_scale" and knobs.true_cfg_scale is not None:
                raise ValueError(f"{self._name} has one guidance: give guidance_scale or true_cfg_scale, not both.")
            given[name] = knobs.guidance_scale
        guidance = self._checked(given)
        if name in self._parameters and name not in guidance:
            default = self._parameters[name].default
            if isinstance(default, (int, float)):
                guidance[name] = float(default)
        return guidance

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were given; those that the pipeline does not take are refused."""
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in self._parameters:
                flag = "--resolution" if name in ("height", "width") else f"--{name}"
                raise ValueError(f"{self._name} takes no {name}: leave {flag} out.")
        return given


def steers_from_texts(
    pipeline: DiffusionPipeline, arguments: ChainArguments, denoisers: Sequence[str] | None = None
) -> bool:
    """Whether a chain with these arguments has guidance that leads away from a text.

    Raises:
        ValueError: as ``DenoisingChain``.
    """
    family = family_of(pipeline, denoisers)
    # UNets of LCM take the guidance scale as an input, and have no negative branch.
    if any(getattr(getattr(pipeline, name).config, "time_cond_proj_dim", None) for name in family.denoisers):
        return False
    return CallArguments(PipelineDriver(pipeline, family), arguments).steers
