"""The families under test: how each pipeline is built and called."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from rlr_peft.build import PictureProcessor
from rlr_peft.chain import DenoisingChain, build_scheduler, family_of
from rlr_peft.prompt import ConditionImage, Prompt
from tests.families import image_pipelines as images
from tests.families import video_pipelines as videos
from tests.pipelines import tiny_stable_diffusion

PROMPTS = ["a red ball", "sky"]
NUM_STEPS = 3
SMALL = {"height": 16, "width": 16}
LARGER = {"height": 32, "width": 32}


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        build: makes the pipeline.
        options: size and lengths, spelled as flags, chain and pipeline spell them.
        double: whether the pipeline runs in float64.
        gradient_tolerance: relative, of central differences. Where a pipeline casts latents or outputs to float32, its
            rounding is what is left.
        needs_image: whether it draws from pictures.
    """

    build: Callable[[], DiffusionPipeline]
    options: dict[str, Any]
    double: bool = True
    gradient_tolerance: float = 5e-4
    needs_image: bool = False


CASES = {
    "sd-epsilon": Case(tiny_stable_diffusion, SMALL, gradient_tolerance=1e-9),
    "sd-v": Case(lambda: tiny_stable_diffusion("v_prediction", timestep_spacing="trailing"), SMALL),
    "sdxl": Case(images.sdxl, SMALL, gradient_tolerance=1e-9),
    "sd3": Case(images.sd3, SMALL, gradient_tolerance=1e-9),
    "flux": Case(images.flux, SMALL),
    "flux-true-cfg": Case(images.flux, SMALL | {"true_cfg_scale": 3.0, "negative_prompt": "ugly"}),
    "qwen-image": Case(images.qwen_image, SMALL),
    "qwen-image-edit": Case(images.qwen_image_edit, SMALL, needs_image=True),
    "pixart-sigma": Case(images.pixart_sigma, SMALL, gradient_tolerance=1e-9),
    "sana": Case(images.sana, LARGER),
    # the pipeline insists on float32 latents
    "z-image": Case(images.z_image, SMALL, double=False),
    "text-to-video-sd": Case(videos.text_to_video_sd, SMALL | {"num_frames": 3}),
    "animatediff": Case(videos.animatediff, SMALL | {"num_frames": 3}),
    "wan-2.1": Case(videos.wan, SMALL | {"num_frames": 5}),
    "wan-2.2": Case(videos.wan_two_experts, SMALL | {"num_frames": 5}),
    "wan-i2v": Case(videos.wan_image_to_video, SMALL | {"num_frames": 5}, needs_image=True),
    "cogvideox": Case(videos.cogvideox, SMALL | {"num_frames": 9, "max_sequence_length": 16}),
    "ltx": Case(videos.ltx, LARGER | {"num_frames": 9}),
    "ltx-2": Case(videos.ltx_2, LARGER | {"num_frames": 5, "max_sequence_length": 16}),
    "ltx-i2v": Case(videos.ltx_image_to_video, LARGER | {"num_frames": 9}, needs_image=True),
}
COLOURS = {"red": (200, 30, 30), "blue": (20, 40, 220)}
VIDEOS = [name for name, case in CASES.items() if "num_frames" in case.options]


def picture(colour: tuple[int, int, int]) -> ConditionImage:
    """Of one colour above and grey below, as a file."""
    drawn = Image.new("RGB", (24, 24), "grey")
    drawn.paste(colour, (0, 0, 24, 12))
    drawn.save(file := io.BytesIO(), "png")
    return ConditionImage(data=file.getvalue())


def prompts_of(name: str) -> list[Prompt]:
    """Two of a family, with a picture each where it draws from pictures."""
    images = map(picture, COLOURS.values()) if CASES[name].needs_image else (None, None)
    return [Prompt(text, image=image) for text, image in zip(PROMPTS, images, strict=True)]


def load(folder: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The saved pipeline through the public path; a Stable Diffusion one has no safety checker to begin with."""
    parts = {}
    if (Path(folder) / "processor").exists():  # transformers' own needs torchvision
        parts["processor"] = PictureProcessor.from_pretrained(folder, subfolder="processor")
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_alone(
    pipeline: DiffusionPipeline, chain: DenoisingChain, prompts: list[Prompt], seeds: list[int]
) -> torch.Tensor:
    """What the pipeline draws without the chain, told what the card tells; from pictures one by one, as not all classes
    take several."""
    scheduler, base = chain.inference_scheduler(), pipeline.scheduler
    told = () if scheduler.sigmas_in_call else scheduler.sigmas
    pipeline.scheduler = build_scheduler(base.config, scheduler.class_name, scheduler.options, told)
    call = chain.call_arguments | scheduler.call_options() | {"num_inference_steps": chain.num_steps}
    call |= {"output_type": "pt", "return_dict": False}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    area = family_of(pipeline).image_area
    images = [prompt.image.fitted(call["width"], call["height"], area) for prompt in prompts if prompt.image]
    if images:
        single = [
            pipeline(prompt=str(prompt), image=image, generator=generator, **call)[0]
            for prompt, image, generator in zip(prompts, images, generators, strict=True)
        ]
        drawn = torch.cat(single)
    else:
        if "negative_prompt" in call:
            call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
        drawn = pipeline(list(map(str, prompts)), generator=generators, **call)[0]
    pipeline.scheduler = base
    return drawn
