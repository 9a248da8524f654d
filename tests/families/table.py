"""The families under test: how each pipeline is built and called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

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
    """

    build: Callable[[], DiffusionPipeline]
    options: dict[str, Any]
    double: bool = True
    gradient_tolerance: float = 5e-4


CASES = {
    "sd-epsilon": Case(tiny_stable_diffusion, SMALL, gradient_tolerance=1e-9),
    "sd-v": Case(lambda: tiny_stable_diffusion("v_prediction", timestep_spacing="trailing"), SMALL),
    "sdxl": Case(images.sdxl, SMALL, gradient_tolerance=1e-9),
    "sd3": Case(images.sd3, SMALL, gradient_tolerance=1e-9),
    "flux": Case(images.flux, SMALL),
    "flux-true-cfg": Case(images.flux, SMALL | {"true_cfg_scale": 3.0, "negative_prompt": "ugly"}),
    "qwen-image": Case(images.qwen_image, SMALL),
    "pixart-sigma": Case(images.pixart_sigma, SMALL, gradient_tolerance=1e-9),
    "sana": Case(images.sana, LARGER),
    # the pipeline insists on float32 latents
    "z-image": Case(images.z_image, SMALL, double=False),
    "text-to-video-sd": Case(videos.text_to_video_sd, SMALL | {"num_frames": 3}),
    "animatediff": Case(videos.animatediff, SMALL | {"num_frames": 3}),
    "wan-2.1": Case(videos.wan, SMALL | {"num_frames": 5}),
    "wan-2.2": Case(videos.wan_two_experts, SMALL | {"num_frames": 5}),
    "cogvideox": Case(videos.cogvideox, SMALL | {"num_frames": 9, "max_sequence_length": 16}),
    "ltx": Case(videos.ltx, LARGER | {"num_frames": 9}),
}
VIDEOS = [name for name, case in CASES.items() if "num_frames" in case.options]


def load(folder: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The saved pipeline through the public path; a Stable Diffusion one has no safety checker to begin with."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
