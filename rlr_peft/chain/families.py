"""What differs between pipeline classes: one row per family, everything else is the pipeline's own code."""

from dataclasses import dataclass

from diffusers import DDIMScheduler, DiffusionPipeline


@dataclass(frozen=True)
class Family:
    """One supported family of pipelines.

    Attributes:
        name: the family's short name.
        pipeline_classes: names of the diffusers pipeline classes that belong to it.
        denoiser: attribute of the pipeline that holds the denoiser.
        lora_targets: modules of the denoiser that get LoRA layers by default.
        pipeline_tag: the Hub's task name.
        tags: the Hub's tags of the family.
        default_guidance_scale: guidance scale where the config gives none.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    denoiser: str
    lora_targets: tuple[str, ...]
    pipeline_tag: str
    tags: tuple[str, ...]
    default_guidance_scale: float


FAMILIES = (
    Family(
        name="stable-diffusion",
        pipeline_classes=("StableDiffusionPipeline",),
        denoiser="unet",
        lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
        pipeline_tag="text-to-image",
        tags=("stable-diffusion", "stable-diffusion-diffusers"),
        default_guidance_scale=7.5,
    ),
)


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline.

    Raises:
        ValueError: the pipeline's class belongs to no supported family.
    """
    class_name = type(pipeline).__name__
    for family in FAMILIES:
        if class_name in family.pipeline_classes:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.pipeline_classes)
    raise ValueError(f"Expected a pipeline of one of the classes {supported}, got {class_name}.")


def stochastic_scheduler(pipeline: DiffusionPipeline) -> DDIMScheduler:
    """The DDIM scheduler with the noise levels that the pipeline was trained on, whatever scheduler it came with.

    Raises:
        ValueError: the pipeline's scheduler clips or thresholds the predicted clean sample; no Gaussian step does.
    """
    config = dict(pipeline.scheduler.config)
    if config.get("thresholding") or (config.get("clip_sample") and isinstance(pipeline.scheduler, DDIMScheduler)):
        raise ValueError(
            "Expected a scheduler with clip_sample=False and thresholding=False, got "
            f"clip_sample={config.get('clip_sample')} and thresholding={config.get('thresholding')}. Load the pipeline "
            "with DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)."
        )
    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
