"""What differs between pipeline classes: one row per family, everything else is the pipeline's own code."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rlr_peft.config.chain import TimestepSpacing
from rlr_peft.files import SECOND_EXPERT

EXPERTS = ("transformer", SECOND_EXPERT)
DENOISERS = ("unet", *EXPERTS)
"""The parts that denoise step by step, and whose adapters pipelines load."""

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
JOINT_ATTENTION = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
)
FLUX_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

NegativeBranch = Literal["first half", "second half", "second call"]
"""Where a pipeline runs the negative branch of a step: in a half of a doubled batch, or in a call of its own."""

ImagesOfCall = Literal["any", "same image", "one sample"]
"""Which samples one call draws from pictures: any, those of one picture, or a single one."""


@dataclass(frozen=True)
class Family:
    """One family of pipelines.

    Attributes:
        name: the family's short name.
        pipeline_classes: names of the diffusers pipeline classes that belong to it.
        own_tags: the Hub's tags of the family; None for its name, alone and with ``-diffusers`` behind it.
        denoisers: attributes of the pipeline that may hold a denoiser; those that it lacks are left out.
        lora_targets: modules of the denoiser that get LoRA layers by default.
        pipeline_tag: the Hub's task name.
        timestep_spacing: where the T steps lie if the config does not say so; None keeps what the pipeline asks for.
        guidance_argument: argument of the pipeline's call that holds the scale of guidance.
        no_guidance: the scale at which it is off.
        frame_axis: axis of the latents (B, ...) along which the first latent frames alone decode to exactly the first
            frames of the video; None where the decoder looks ahead.
        negative_branch: where the pipeline's call runs the negative branch of guidance; None where that is not known.
        needs_image: whether the pipeline's call must be given a picture, though its signature does not say so.
        images_of_call: which samples one call draws from pictures.
        image_area: pixels that the call scales a picture to, whatever size it draws; None for the size that is drawn.
        starts_with_image: whether the latents (B, S, C) start with those of the picture, as a mask (B, S) says that
            ``prepare_latents`` returns beside them, and steps are taken on the others, unpacked to (B, C, F, h, w).
        has_sound: whether sound is drawn in the same loop, whose tokens (B, S_sound, C), made by
            ``prepare_audio_latents``, are the last ones of the chain's latents (B, S, C).
        other_guidance: further arguments of guidance, with the values at which they are off.
        needs_package: what the pipeline's code cannot do without, by its name and that of our extra; None for nothing.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    own_tags: tuple[str, ...] | None = None
    denoisers: tuple[str, ...] = ("unet", "transformer")
    lora_targets: tuple[str, ...] = ATTENTION
    pipeline_tag: str = "text-to-image"
    timestep_spacing: TimestepSpacing | None = None
    guidance_argument: str = "guidance_scale"
    no_guidance: float = 1.0
    frame_axis: int | None = None
    negative_branch: NegativeBranch | None = "first half"
    needs_image: bool = False
    images_of_call: ImagesOfCall = "any"
    image_area: int | None = None
    starts_with_image: bool = False
    has_sound: bool = False
    other_guidance: tuple[tuple[str, float], ...] = ()
    needs_package: str | None = None

    @property
    def tags(self) -> tuple[str, ...]:
        """The Hub's tags of the family."""
        return (self.name, f"{self.name}-diffusers") if self.own_tags is None else self.own_tags


# VAEs that decode one video at a time, because their tiles or the mask of their attention fit a single one; by their
# classes, which pipelines of any family may have.
ONE_VIDEO_VAES = ("AutoencoderKLHunyuanVideo15", "AutoencoderKLAllegro")
# VAEs that decode tile by tile alone.
TILED_VAES = ("AutoencoderKLAllegro",)
# Classes that guide away from a negative prompt without having an empty one by themselves.
NEED_NEGATIVE_PROMPT = ("EasyAnimatePipeline",)
FAMILIES = (
    Family(  # its grid is the checkpoint's own, so that runs repeat published ones
        name="stable-diffusion",
        pipeline_classes=("StableDiffusionPipeline",),
    ),
    Family(
        name="stable-diffusion-xl",
        pipeline_classes=("StableDiffusionXLPipeline",),
        timestep_spacing="trailing",
    ),
    Family(
        name="stable-diffusion-3",
        pipeline_classes=("StableDiffusion3Pipeline",),
        own_tags=("sd3.5", "sd3.5-diffusers"),
        lora_targets=JOINT_ATTENTION,
    ),
    Family(
        name="flux",
        pipeline_classes=("FluxPipeline",),
        lora_targets=(*JOINT_ATTENTION, *FLUX_FEED_FORWARD),
        negative_branch="second call",
    ),
    Family(
        name="flux-kontext",
        pipeline_classes=("FluxKontextPipeline",),
        own_tags=("flux", "flux-diffusers", "flux-kontext"),
        lora_targets=(*JOINT_ATTENTION, *FLUX_FEED_FORWARD),
        pipeline_tag="image-to-image",
        negative_branch="second call",
    ),
    Family(
        name="qwen-image",
        pipeline_classes=("QwenImagePipeline",),
        lora_targets=JOINT_ATTENTION,
        timestep_spacing="trailing",
        guidance_argument="true_cfg_scale",
        negative_branch="second call",
    ),
    Family(
        name="qwen-image-edit",
        pipeline_classes=("QwenImageEditPipeline",),
        own_tags=("qwen-image", "qwen-image-diffusers"),
        lora_targets=JOINT_ATTENTION,
        pipeline_tag="image-to-image",
        timestep_spacing="trailing",
        guidance_argument="true_cfg_scale",
        negative_branch="second call",
        needs_image=True,
        image_area=1024 * 1024,
    ),
    Family(
        name="qwen-image-edit-plus",
        pipeline_classes=("QwenImageEditPlusPipeline",),
        own_tags=("qwen-image", "qwen-image-diffusers"),
        lora_targets=JOINT_ATTENTION,
        pipeline_tag="image-to-image",
        timestep_spacing="trailing",
        guidance_argument="true_cfg_scale",
        negative_branch="second call",
        needs_image=True,
        image_area=1024 * 1024,
        images_of_call="one sample",
    ),
    Family(
        name="pixart-sigma",
        pipeline_classes=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        own_tags=("pixart-sigma",),
        timestep_spacing="trailing",
    ),
    Family(
        name="sana",
        pipeline_classes=("SanaPipeline",),
    ),
    Family(
        name="z-image",
        pipeline_classes=("ZImagePipeline",),
        no_guidance=0.0,
        negative_branch="second half",
    ),
    Family(
        name="text-to-video-sd",
        pipeline_classes=("TextToVideoSDPipeline",),
        own_tags=("text-to-video-sd",),
        pipeline_tag="text-to-video",
        timestep_spacing="trailing",
        frame_axis=2,
    ),
    Family(
        name="animatediff",
        pipeline_classes=("AnimateDiffPipeline",),
        own_tags=("animatediff",),
        pipeline_tag="text-to-video",
        timestep_spacing="trailing",
        frame_axis=2,
    ),
    Family(
        name="wan",
        pipeline_classes=("WanPipeline",),
        denoisers=EXPERTS,
        pipeline_tag="text-to-video",
        frame_axis=2,
        negative_branch="second call",
    ),
    Family(
        name="wan-image-to-video",
        pipeline_classes=("WanImageToVideoPipeline",),
        own_tags=("wan", "wan-diffusers"),
        denoisers=EXPERTS,
        pipeline_tag="image-to-video",
        frame_axis=2,
        negative_branch="second call",
        needs_image=True,
        images_of_call="same image",
        needs_package="ftfy",
    ),
    Family(
        name="cogvideox",
        pipeline_classes=("CogVideoXPipeline",),
        pipeline_tag="text-to-video",
        timestep_spacing="trailing",
    ),
    Family(
        name="ltx-video",
        pipeline_classes=("LTXPipeline",),
        pipeline_tag="text-to-video",
    ),
    Family(
        name="ltx-image-to-video",
        pipeline_classes=("LTXImageToVideoPipeline",),
        own_tags=("ltx-video", "ltx-video-diffusers"),
        pipeline_tag="image-to-video",
        needs_image=True,
        starts_with_image=True,
    ),
    Family(
        name="ltx-2",
        pipeline_classes=("LTX2Pipeline",),
        pipeline_tag="text-to-video",
        has_sound=True,
        other_guidance=(
            ("stg_scale", 0.0),
            ("modality_scale", 1.0),
            ("audio_guidance_scale", 1.0),
            ("audio_stg_scale", 0.0),
            ("audio_modality_scale", 1.0),
        ),
    ),
)

GENERIC = Family(name="generic", pipeline_classes=(), own_tags=(), lora_targets=(), negative_branch=None)
"""The row that an unknown pipeline class is tried with."""

GENERIC_TARGETS = (
    *ATTENTION,
    *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
    *("to_key", "to_query", "to_value"),  # Kandinsky 5
)


def family_of_class(pipeline_class: str) -> Family | None:
    """The row of a pipeline class by its name; None for a class that no row knows."""
    return next((family for family in FAMILIES if pipeline_class in family.pipeline_classes), None)


def family_of(pipeline: Any, denoisers: Sequence[str] | None = None) -> Family:
    """The family of a loaded pipeline, with the denoisers that it really has.

    Args:
        pipeline: of any class; an unknown one gets the generic row.
        denoisers: the attributes that hold what is trained; None takes all that the row names.

    Raises:
        ValueError: no denoiser under these names.
    """
    class_name = type(pipeline).__name__
    family = family_of_class(class_name)
    if family is None:
        task = "text-to-video" if hasattr(pipeline, "video_processor") else "text-to-image"
        family = replace(GENERIC, pipeline_classes=(class_name,), pipeline_tag=task)
    names = tuple(denoisers or family.denoisers)
    present = tuple(name for name in names if isinstance(getattr(pipeline, name, None), nn.Module))
    if not present or (denoisers and present != names):
        parts = getattr(pipeline, "components", {})
        models = [name for name, part in parts.items() if isinstance(part, nn.Module)]
        raise ValueError(
            f"Could not determine the denoiser of {class_name}: expected {' or '.join(names)}, got a pipeline with "
            f"{', '.join(models) or 'no models'}. Set --denoiser to the one that is trained."
        )
    return replace(family, denoisers=present)


def models_of(pipeline: Any) -> dict[str, nn.Module]:
    """All models of a pipeline, text encoders and VAE among them, by its names of them."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def trained_module(pipeline: Any, denoisers: Sequence[str]) -> nn.Module:
    """What is trained: the denoiser, or a ``ModuleDict`` of several that share the work."""
    modules = {name: getattr(pipeline, name) for name in denoisers}
    if len(modules) == 1:
        return next(iter(modules.values()))
    several = nn.ModuleDict(modules)
    several.training = any(module.training for module in modules.values())  # a new container is in training mode
    return several


def adapter_folder(denoiser: str) -> str:
    """Subfolder in which a denoiser's adapter is saved; empty for that of the first."""
    return denoiser if denoiser == SECOND_EXPERT else ""


def adapter_prefix(denoiser: str) -> str:
    """What the keys of a denoiser's adapter start with: both experts have those of the first."""
    return "transformer" if denoiser == SECOND_EXPERT else denoiser


def denoiser_of_file(path: Path, folder: Path, pipeline: Any) -> str | None:
    """The second expert, where a file of an adapter's folder is for that: its keys are those of the first."""
    has_second = getattr(pipeline, SECOND_EXPERT, None) is not None
    is_for_second = path.parent != folder or (folder.name == SECOND_EXPERT and has_second)
    return SECOND_EXPERT if is_for_second else None


def adapter_loading(denoiser: str) -> dict[str, bool]:
    """Arguments by which ``load_lora_weights`` finds the denoiser, beside the place of its adapter."""
    return {f"load_into_{SECOND_EXPERT}": True} if denoiser == SECOND_EXPERT else {}


@contextmanager
def explaining_unknown_class(pipeline: Any, family: Family) -> Iterator[None]:
    """Says, where a class that no row knows cannot be driven, that it was a try, and which options may help.

    Raises:
        ValueError: whatever went wrong inside, of an unknown class.
    """
    try:
        yield
    except Exception as error:
        if family.name != GENERIC.name:
            raise
        raise ValueError(
            f"{type(pipeline).__name__} is not among the supported pipelines; it was tried as it is and stopped with "
            f"{type(error).__name__}: {error}. If a size or a length is missing, set --height and --width, "
            "--num_frames or --max_sequence_length; if another part should be trained, set --denoiser."
        ) from error


def default_lora_targets(family: Family, denoiser: nn.Module) -> tuple[str, ...]:
    """The family's targets; for an unknown class the attention projections that the denoiser has.

    Raises:
        ValueError: an unknown class without any such layer.
    """
    if family.lora_targets:
        return family.lora_targets
    names = [f".{name}" for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    found = tuple(target for target in GENERIC_TARGETS if any(name.endswith(f".{target}") for name in names))
    if not found:
        raise ValueError(
            f"Could not determine the LoRA targets of {type(denoiser).__name__}: none of its linear layers is named "
            f"{', '.join(GENERIC_TARGETS)}. Set --lora_layers to the names of the layers to adapt."
        )
    return found


def lora_targets(layers: str | None, family: Family, denoiser: nn.Module) -> tuple[str, ...]:
    """The modules that `--lora_layers` means: a list of names, `attention`, `all-linear`, or None for the default."""
    match layers:
        case None:
            return default_lora_targets(family, denoiser)
        case "attention":
            return default_lora_targets(GENERIC, denoiser)
        case "all-linear":
            return tuple(name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear))
        case _:
            return tuple(name.strip() for name in layers.split(","))


@dataclass(frozen=True)
class FirstFrames:
    """How to decode the first frames alone.

    Attributes:
        num_frames: frames of the video.
        latent_frames: latent frames that they come from.
        axis: of the latent frames in (B, ...).
    """

    num_frames: int
    latent_frames: int
    axis: int


def first_frames(pipeline: Any, family: Family, num_frames: int, latents_shape: Sequence[int]) -> FirstFrames:
    """The part of the latents that decodes to exactly the first frames of the whole video.

    Raises:
        ValueError: the family's decoder looks at later frames too, the frames do not fall on a latent frame's end, or
            the video has fewer.
    """
    name = type(pipeline).__name__
    if family.frame_axis is None:
        raise ValueError(
            f"decoded_frames: {name} does not decode first frames alone: its decoder looks ahead, or it makes images. "
            "Leave --decoded_frames out."
        )
    ratio = getattr(pipeline, "vae_scale_factor_temporal", 1)
    if (num_frames - 1) % ratio:
        lower = (num_frames - 1) // ratio * ratio + 1
        raise ValueError(
            f"decoded_frames: {name} decodes 1, {ratio + 1}, {2 * ratio + 1}, ... frames, got {num_frames}; use "
            f"{lower} or {lower + ratio}."
        )
    latent_frames, available = (num_frames - 1) // ratio + 1, latents_shape[family.frame_axis - 1]
    if latent_frames > available:
        raise ValueError(
            f"decoded_frames: expected at most the {(available - 1) * ratio + 1} frames of the video, got "
            f"{num_frames}; lower --decoded_frames or raise --num_frames."
        )
    return FirstFrames(num_frames, latent_frames, family.frame_axis)
