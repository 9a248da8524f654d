"""The families under test: how each pipeline is built, called, and made to draw without the chain."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from tests.families import image_pipelines as images
from tests.families import video_pipelines as videos
from tests.pipelines import tiny_stable_diffusion

PROMPTS = ["a red ball", "sky"]
NUM_STEPS = 3
LEVELS = numpy.linspace(1, 1 / NUM_STEPS, NUM_STEPS).tolist()
SMALL = {"height": 16, "width": 16}
LARGER = {"height": 32, "width": 32}


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        build: makes the pipeline.
        options: size and lengths, spelled as flags, chain and pipeline spell them.
        own_scheduler: from the pipeline's scheduler to one that takes the chain's deterministic steps.
        own_options: what the pipeline must be told to use the chain's grid.
        own_grid: the chain's grid in that comparison, where the pipeline cannot be told another.
        double: whether the pipeline runs in float64.
        gradient_tolerance: relative, of central differences. Where a pipeline casts latents or outputs to float32, its
            rounding is what is left.
    """

    build: Callable[[], DiffusionPipeline]
    options: dict[str, Any]
    own_scheduler: Callable[[Any], Any] = lambda scheduler: scheduler
    own_options: dict[str, Any] = field(default_factory=dict)
    own_grid: str | None = None
    double: bool = True
    gradient_tolerance: float = 5e-4


def trailing_ddim(scheduler: Any) -> DDIMScheduler:
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False)


def shifted_euler(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=scheduler.config.flow_shift)


def euler_without_terminal(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift_terminal=None)


CASES = {
    "sd-epsilon": Case(tiny_stable_diffusion, SMALL, gradient_tolerance=1e-9),
    "sd-v": Case(lambda: tiny_stable_diffusion("v_prediction", timestep_spacing="trailing"), SMALL),
    "sdxl": Case(images.sdxl, SMALL, trailing_ddim, gradient_tolerance=1e-9),
    "sd3": Case(images.sd3, SMALL, own_options={"sigmas": LEVELS}, gradient_tolerance=1e-9),
    "flux": Case(images.flux, SMALL),
    "flux-true-cfg": Case(
        images.flux,
        SMALL | {"true_cfg_scale": 3.0, "negative_prompt": "ugly"},
        own_options={"negative_prompt": ["ugly"] * len(PROMPTS)},
    ),
    "qwen-image": Case(
        images.qwen_image, SMALL, euler_without_terminal, own_options={"negative_prompt": [" "] * len(PROMPTS)}
    ),
    "pixart-sigma": Case(
        images.pixart_sigma, SMALL, trailing_ddim, {"use_resolution_binning": False}, gradient_tolerance=1e-9
    ),
    "sana": Case(images.sana, LARGER, shifted_euler, {"use_resolution_binning": False, "sigmas": LEVELS}),
    # the pipeline insists on float32 latents
    "z-image": Case(images.z_image, SMALL, double=False),
    "text-to-video-sd": Case(videos.text_to_video_sd, SMALL | {"num_frames": 3}, trailing_ddim),
    "animatediff": Case(videos.animatediff, SMALL | {"num_frames": 3}, trailing_ddim),
    "wan-2.1": Case(videos.wan, SMALL | {"num_frames": 5}, shifted_euler, own_grid="linspace"),
    "wan-2.2": Case(videos.wan_two_experts, SMALL | {"num_frames": 5}, shifted_euler, own_grid="linspace"),
    "cogvideox": Case(videos.cogvideox, SMALL | {"num_frames": 9, "max_sequence_length": 16}),
    "ltx": Case(videos.ltx, LARGER | {"num_frames": 9}),
}
VIDEOS = [name for name, case in CASES.items() if "num_frames" in case.options]


def load(folder: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The saved pipeline through the public path; a Stable Diffusion one has no safety checker to begin with."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
