"""Drives a pipeline by its own ``__call__``: with a chain's scheduler, remembered prompts and a reward's decoder.

Which arguments the call takes is read off its signature, so that no argument of a family is written down here. Classes
that no chain can drive are told from their names and signatures, with the reason, before anything is loaded.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from itertools import groupby
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image

from rlr_peft.chain.denoiser_forwards import DetachedNegative
from rlr_peft.chain.encodings import EncodedImages, PromptCache
from rlr_peft.chain.families import DENOISERS, Family, ImagesOfCall, family_of_class, trained_module
from rlr_peft.chain.memory import cast_inputs_to_weights, working_device
from rlr_peft.chain.scheduler import RecordedSteps, RecordingScheduler
from rlr_peft.errors import extra
from rlr_peft.prompt import ConditionImage, Prompt

FRAMES_ARGUMENTS = ("num_frames", "frames", "video_length")

# Arguments that are lists with an entry for every sample.
PER_SAMPLE = {"negative_prompt", "generator"}

SizedImage = tuple[ConditionImage | None, tuple[int, int]]


class PipelineDriver:
    """A pipeline, called on whatever steps a scheduler exposes. All chains over one pipeline can share it.

    The pipeline is left as it was after every call: what is exchanged, is exchanged only meanwhile. (Half-precision
    denoisers and decoders keep a hook that casts their inputs.)

    Args:
        pipeline: a loaded pipeline without safety checker.
        reward_decoder: decodes in place of the pipeline's VAE where asked to; None leaves the VAE.

    Attributes:
        name: the pipeline's class.
        device: where the models work.
        denoiser: what is trained; of a pipeline with several denoisers a ``ModuleDict`` of all.
        latents_dtype: float32, or float64 if the denoiser is.
        parameters: of the pipeline's call, by name.
        negative_branch: takes that of guidance off the tape; None where it is not known where it runs.
        frames_argument: what the call names the number of frames; None for images.
        prepared: the latents that the pipeline made at the latest call without any, as its steps see them; None where
            it does so in no method of its own.

    Raises:
        ValueError: a pipeline that cannot be given prompts and latents, or one with a safety checker.
        UserError: the pipeline's code needs a package that is not there.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family,
        reward_decoder: torch.nn.Module | None = None,
    ) -> None:
        if (reason := refusal(type(pipeline))) is not None:
            raise ValueError(f"{type(pipeline).__name__} cannot be driven as a chain: {reason}.")
        if getattr(pipeline, "safety_checker", None) is not None:
            raise ValueError("Expected a pipeline without safety checker: load it with safety_checker=None.")
        self.pipeline = pipeline
        self.family = family
        self.name = type(pipeline).__name__
        self.reward_decoder = reward_decoder
        self._undecorated: Callable[..., Any] = inspect.unwrap(type(pipeline).__call__)  # without its no_grad
        self.parameters = inspect.signature(self._undecorated).parameters
        if family.needs_package is not None:
            extra(family.needs_package, family.needs_package, self.name)
        self.prepared: torch.Tensor | None = None
        self.frames_argument = next((name for name in FRAMES_ARGUMENTS if name in self.parameters), None)
        first = getattr(pipeline, family.denoisers[0])
        self.device = working_device(first)
        self.denoiser = trained_module(pipeline, family.denoisers)
        self.latents_dtype = torch.promote_types(first.dtype, torch.float32)
        encode_prompt = getattr(pipeline, "encode_prompt", None)  # OmniGen's transformer reads the prompt itself
        self._encode_prompt = None if encode_prompt is None else PromptCache(encode_prompt, self.latents_dtype)
        self._encoded_images = EncodedImages(pipeline)
        self._given = 0
        self.negative_branch = None
        if family.negative_branch is not None:
            modules = [getattr(pipeline, name, None) for name in DENOISERS]
            present = [module for module in modules if isinstance(module, torch.nn.Module)]
            self.negative_branch = DetachedNegative(present, family.negative_branch)
        for module in _denoisers_and_decoder(pipeline, family, reward_decoder):
            cast_inputs_to_weights(module)

    def __call__(
        self,
        scheduler: RecordingScheduler | SchedulerMixin,
        prompts: Sequence[Prompt],
        latents: torch.Tensor | None,
        arguments: Mapping[str, Any],
        detach_negative: bool = False,
    ) -> torch.Tensor:
        """What the pipeline returns first for the exposed steps: latents, images (B, 3, H, W) or videos.

        Args:
            scheduler: exposes the steps; one of diffusers takes all of its own.
            prompts: B prompts.
            latents: where to start, (B, ...); None lets the pipeline draw noise.
            arguments: the others of the pipeline's call.
            detach_negative: run the negative branch of guidance without gradients.
        """
        batches = batches_of_one_call(self.family.images_of_call, prompts)
        if len(batches) == 1:
            return self._call(scheduler, prompts, latents, arguments, detach_negative)
        returned, recorded = [], []
        for samples in batches:
            part = scheduler.of_samples(samples) if isinstance(scheduler, RecordingScheduler) else scheduler
            given = None if latents is None else latents[samples]
            options = {name: value[samples] if name in PER_SAMPLE else value for name, value in arguments.items()}
            returned.append(self._call(part, prompts[samples], given, options, detach_negative))
            if isinstance(part, RecordingScheduler):
                recorded.append(part.recorded)
        if isinstance(scheduler, RecordingScheduler):
            scheduler.recorded = RecordedSteps.joined(recorded)
        return torch.cat(returned)

    def _call(
        self,
        scheduler: RecordingScheduler | SchedulerMixin,
        prompts: Sequence[Prompt],
        latents: torch.Tensor | None,
        arguments: Mapping[str, Any],
        detach_negative: bool,
    ) -> torch.Tensor:
        detached: AbstractContextManager[None] = nullcontext()
        if detach_negative and self.negative_branch is not None:
            detached = self.negative_branch.off_tape(len(prompts))
        texts = [prompt.text for prompt in prompts]
        images = self.condition_images(prompts, arguments)
        encoded = self._encoded_images.of(images) if images else nullcontext()
        options = {**self._as_argument(images), **arguments}
        is_decoded = arguments["output_type"] != "latent"
        sound = self._sound_entering_as(latents, on_tape=not is_decoded) if self.family.has_sound else nullcontext()
        with self._driven_by(scheduler) as pipeline, detached, encoded, self._entering_as(latents) as given, sound:
            returned = self._undecorated(pipeline, prompt=texts, latents=given, return_dict=False, **options)[0]
        if isinstance(scheduler, RecordingScheduler) and scheduler.sound is not None:
            scheduler.recorded = RecordedSteps.joined([scheduler.recorded, scheduler.sound.recorded], axis=1)
        return returned[:, self._given :] if self._given and not is_decoded else returned

    @contextmanager
    def decoding_for_rewards(self) -> Iterator[None]:
        """Inside, the reward's decoder, if there is one, stands in for the pipeline's VAE."""
        if self.reward_decoder is None:
            yield
            return
        attributes = self.pipeline.__dict__  # past the pipeline's __setattr__, which would note it in its config
        vae, attributes["vae"] = attributes["vae"], self.reward_decoder
        try:
            yield
        finally:
            attributes["vae"] = vae

    def condition_images(self, prompts: Sequence[Prompt], arguments: Mapping[str, Any]) -> list[SizedImage]:
        """The pictures of one call, each with the size that is drawn; none where no prompt has one.

        The empty prompt, of which only shapes are asked, has a grey one where the pipeline needs any.

        Raises:
            ValueError: a pipeline that takes none, or prompts without one.
        """
        images = [prompt.image for prompt in prompts]
        parameter = self.parameters.get("image")
        is_needed = self.family.needs_image or (parameter is not None and parameter.default is parameter.empty)
        if not is_needed and not any(images):
            return []
        if parameter is None:
            raise ValueError(f"{self.name} takes no image: leave --image_column out.")
        width, height = arguments.get("width"), arguments.get("height")
        if not width or not height:
            raise ValueError("expected a size that condition images are fitted to: give --resolution")
        missing = [prompt.text for prompt in prompts if prompt.image is None and prompt.text]
        if missing:
            raise ValueError(
                f"{self.name} draws from images, and the prompt {missing[0]!r} has none: --image_column gives those of "
                "tables, and --validation_prompt has none, so leave it out"
            )
        shown = images if self.family.images_of_call == "any" else images[:1]
        return [(image, (width, height)) for image in shown]

    def _as_argument(self, images: Sequence[SizedImage]) -> dict[str, Any]:
        """The argument of the call: a list, or the picture itself where a call takes one."""
        if not images:
            return {}
        family = self.family
        pictures = [
            Image.new("RGB", size, "grey") if image is None else image.fitted(*size, family.image_area)
            for image, size in images
        ]
        return {"image": pictures if family.images_of_call == "any" else pictures[0]}

    @contextmanager
    def _entering_as(self, latents: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
        """Inside, the pipeline starts from these latents, if it is given what comes out as the call's argument.

        They enter where it makes its own: as an argument some pipelines take them in another form than their steps do,
        unpacked or without the channels of a condition.
        """
        prepare = getattr(self.pipeline, "prepare_latents", None)
        if prepare is None:
            yield latents
            return
        devices = [self.device] if self.device.type == "cuda" else []

        @wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            with torch.random.fork_rng(devices, enabled=latents is not None):  # its own noise is not used then
                made = prepare(*args, **kwargs)
            first, *others = made if isinstance(made, tuple) else (made,)
            self._given = int(others[0][0].sum()) if self.family.starts_with_image else 0
            if latents is None:
                self.prepared = first
                return made
            tokens = first.shape[1] if self.family.has_sound else latents.shape[1]
            entering = latents[:, :tokens].clone()  # Kandinsky 5 writes into them
            if self._given:
                entering = torch.cat([first[:, : self._given].to(latents), latents], dim=1)
            if first.shape[:-1] == latents.shape[:-1]:  # else latents of another size than the call's are decoded
                further = first[..., latents.shape[-1] :]  # channels of a condition, none in most pipelines
                entering = torch.cat([latents, further.to(latents)], dim=-1) if further.numel() else entering
            return (entering, *others) if isinstance(made, tuple) else entering

        self.pipeline.prepare_latents = prepared
        try:
            yield None
        finally:
            del self.pipeline.prepare_latents

    @contextmanager
    def _sound_entering_as(self, latents: torch.Tensor | None, on_tape: bool) -> Iterator[None]:
        """Inside, the pipeline starts its sound from the last tokens of these latents.

        Args:
            on_tape: False where the sound is decoded, which no reward hears.
        """
        prepare = self.pipeline.prepare_audio_latents
        devices = [self.device] if self.device.type == "cuda" else []

        @wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.random.fork_rng(devices, enabled=latents is not None):
                made: torch.Tensor = prepare(*args, **kwargs)
            if latents is None:
                self.prepared = made if self.prepared is None else torch.cat([self.prepared, made], dim=1)
                return made
            sound = latents[:, -made.shape[1] :]
            return sound.clone() if on_tape else sound.detach()

        self.pipeline.prepare_audio_latents = prepared
        try:
            yield
        finally:
            del self.pipeline.prepare_audio_latents

    @contextmanager
    def _driven_by(self, scheduler: RecordingScheduler | SchedulerMixin) -> Iterator[DiffusionPipeline]:
        pipeline = self.pipeline
        own, progress = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
        pipeline.scheduler = scheduler
        if self._encode_prompt is not None:
            pipeline.encode_prompt = self._encode_prompt
        pipeline.set_progress_bar_config(**{**progress, "disable": True})
        try:
            with self._on_known_device():
                yield pipeline
        finally:
            pipeline.scheduler, pipeline._progress_bar_config = own, progress
            if self._encode_prompt is not None:
                del pipeline.encode_prompt

    @contextmanager
    def _on_known_device(self) -> Iterator[None]:
        """Inside, the pipeline knows where it works; by itself it looks at every layer of all models at each call."""
        kind = type(self.pipeline)  # a property can be hidden by its class alone
        own = vars(kind).get("_execution_device")
        kind._execution_device = self.device
        try:
            yield
        finally:
            if own is None:
                del kind._execution_device
            else:
                kind._execution_device = own


def _denoisers_and_decoder(pipeline: Any, family: Family, reward_decoder: Any) -> Iterator[torch.nn.Module]:
    """Every module that latents or embeddings enter: a second expert too that is not trained."""
    vae = getattr(pipeline, "vae", None)
    places = [(pipeline, name) for name in dict.fromkeys((*family.denoisers, *DENOISERS))]
    places += [(pipeline, "connectors"), (vae, "decoder"), (vae, "post_quant_conv"), (reward_decoder, "decoder")]
    for owner, name in places:
        module = getattr(owner, name, None)
        if isinstance(module, torch.nn.Module):
            yield module


def batches_of_one_call(images: ImagesOfCall, prompts: Sequence[Prompt]) -> list[slice]:
    """Which neighbours among the samples one call can draw: all, those of one picture, or a single one."""
    if images == "any":
        return [slice(0, len(prompts))]
    single = images == "one sample"
    batches, start = [], 0
    for _, samples in groupby(enumerate(prompts), lambda numbered: (single and numbered[0], numbered[1].image)):
        stop = start + len(list(samples))
        batches.append(slice(start, stop))
        start = stop
    return batches


CODE_BOOK = "it draws tokens of a code book, not latents with Gaussian noise; take StableDiffusion3Pipeline"
CONSISTENCY = "its scheduler takes the steps of a consistency model, not Gaussian steps along a path"
FLOW_MAP = "its scheduler jumps along a flow map, not in Gaussian steps along a path; take WanPipeline"
GUARDRAIL = (
    "its call demands a safety checker, which no gradient passes, and its licence forbids to leave the checker out"
)
PRIOR = "its prior draws another embedding at every call, so that no step can be taken again"
MOTION = "its call moves latents in steps 44 and 47 of a chain of its own"

REFUSED = {
    "AmusedPipeline": CODE_BOOK,
    "AnyFlowFARPipeline": FLOW_MAP,
    "AnyFlowPipeline": FLOW_MAP,
    "Cosmos2TextToImagePipeline": f"{GUARDRAIL}; take SanaPipeline",
    "Cosmos2_5_PredictBasePipeline": f"{GUARDRAIL}; take WanPipeline",
    "CosmosTextToWorldPipeline": f"{GUARDRAIL}; take WanPipeline",
    "GlmImagePipeline": (
        "a language model draws another layout of the image at every call, so that no step can be taken again; take "
        "CogView4Pipeline"
    ),
    "HeliosPyramidPipeline": (
        "it draws at three resolutions one after the other, with new noise in between; take HeliosPipeline"
    ),
    "IFPipeline": "it draws pixels, and its call takes no `latents` to go on from; take PRXPixelPipeline",
    "Kandinsky6TI2VAPipeline": (
        "it draws sound in the loop of its video, in another form than LTX-2; take Kandinsky5T2VPipeline"
    ),
    "KandinskyCombinedPipeline": f"{PRIOR}; take Kandinsky3Pipeline or Kandinsky5T2IPipeline",
    "KandinskyPipeline": f"{PRIOR}; take Kandinsky3Pipeline or Kandinsky5T2IPipeline",
    "KandinskyV22CombinedPipeline": f"{PRIOR}; take Kandinsky3Pipeline or Kandinsky5T2IPipeline",
    "KandinskyV22Pipeline": f"{PRIOR}; take Kandinsky3Pipeline or Kandinsky5T2IPipeline",
    "LDMTextToImagePipeline": "its call returns finished images alone, no latents; take StableDiffusionPipeline",
    "LTX2ConditionPipeline": "every token of its video has a noise level of its own; take LTX2Pipeline",
    "LTX2DFRPipeline": "every token of its video has a noise level of its own; take LTX2Pipeline",
    "LTX2DFRTemporalRefinePipeline": "it refines videos that another pipeline drew; take LTX2Pipeline",
    "LatentConsistencyModelPipeline": (
        f"{CONSISTENCY}; take the base that it was distilled from, or a base of few steps as `--config sdxl_turbo` does"
    ),
    "SanaSprintPipeline": f"{CONSISTENCY}; take SanaPipeline",
    "SemanticStableDiffusionPipeline": (
        "its guidance remembers the steps before, so that no step can be taken alone; take StableDiffusionPipeline"
    ),
    "SkyReelsV2DiffusionForcingPipeline": "every frame has a noise level of its own; take SkyReelsV2Pipeline",
    "StableCascadeCombinedPipeline": f"{PRIOR}; take StableDiffusionXLPipeline",
    "StableDiffusionSAGPipeline": (
        "its guidance blurs images by noise levels of its own scheduler; take StableDiffusionPAGPipeline"
    ),
    "StableUnCLIPPipeline": f"{PRIOR}; take StableDiffusionPipeline",
    "TextToVideoZeroPipeline": f"{MOTION}; take AnimateDiffPipeline",
    "TextToVideoZeroSDXLPipeline": f"{MOTION}; take AnimateDiffSDXLPipeline",
    "UnCLIPPipeline": f"{PRIOR}; take StableDiffusionPipeline",
    "UniDiffuserPipeline": (
        "its one transformer draws a picture and a text together, and diffusers has given it up; take "
        "StableDiffusionPipeline"
    ),
    "VQDiffusionPipeline": CODE_BOOK,
    "VersatileDiffusionTextToImagePipeline": (
        "its UNet is put together of two at every call, and diffusers has given it up; take StableDiffusionPipeline"
    ),
    "WuerstchenCombinedPipeline": f"{PRIOR}; take StableDiffusionXLPipeline",
}
"""By the name of a class: the reason, and a class that works in its place."""

NEEDED = ("prompt", "latents", "num_inference_steps", "output_type")
"""Arguments without which a call cannot be driven."""


def refusal(pipeline_class: type) -> str | None:
    """Why no chain can drive a class, whatever its weights, as half a sentence; None where one may."""
    name = pipeline_class.__name__
    if name in REFUSED:
        return REFUSED[name]
    if not issubclass(pipeline_class, DiffusionPipeline):  # a stand-in for one whose packages are missing
        return None
    parameters = inspect.signature(inspect.unwrap(pipeline_class.__call__)).parameters
    lacking = next((needed for needed in NEEDED if needed not in parameters), None)
    if lacking is not None:
        return f"its call takes no `{lacking}`"
    family = family_of_class(name)
    if "audio_latents" in parameters and not (family is not None and family.has_sound):
        return "it draws sound in the loop of its pictures, which is known of LTX2Pipeline alone"
    return None
