"""Knobs of the denoising chain."""

from dataclasses import dataclass
from typing import Literal

from rlr_peft.config.knob import knob

StepKind = Literal["ancestral", "flow-sde", "cps", "ode"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class ChainArguments:
    """Chain: how images are sampled while training"""

    num_inference_steps: int = knob(
        50, "Number T of denoising steps of a chain.", unit="steps", at_least=1, at_most=1000
    )
    step_kind: StepKind = knob("ancestral", "Kind of denoising step; `ode` adds no noise at all.")
    eta: float = knob(
        1.0,
        "Noise added at each step relative to the kind's own: 0 is deterministic, 1 the full noise.",
        unit="factor",
        at_least=0,
        at_most=10,
    )
    timestep_spacing: TimestepSpacing | None = knob(
        None, "Where the steps lie; null means the family's choice. `trailing` keeps the last step from being dead."
    )
    scheduler_type: Literal["diffusion", "flow"] | None = knob(
        None, "Kind of noising path the model was trained on; null reads it off the pipeline's scheduler."
    )
    guidance_scale: float | None = knob(
        None,
        "Classifier-free guidance scale; null means the pipeline's own default.",
        unit="factor",
        at_least=0,
        at_most=1000,
    )
    true_cfg_scale: float | None = knob(
        None,
        "Classifier-free guidance of pipelines whose guidance_scale is built into the model, such as FLUX.",
        unit="factor",
        at_least=0,
        at_most=1000,
    )
    resolution: int | None = knob(
        None,
        "Height and width of the images; null means the pipeline's default.",
        unit="pixels",
        at_least=1,
        at_most=16384,
    )
    height: int | None = knob(
        None,
        "Height of images or videos, over resolution; null means resolution.",
        unit="pixels",
        at_least=1,
        at_most=16384,
    )
    width: int | None = knob(
        None,
        "Width of images or videos, over resolution; null means resolution.",
        unit="pixels",
        at_least=1,
        at_most=16384,
    )
    num_frames: int | None = knob(
        None, "Frames of a video; null means the pipeline's default.", unit="frames", at_least=1, at_most=10_000
    )
    fps: int | None = knob(
        None,
        "Speed of the videos, told to models that ask for it; null means the pipeline's default, or 8.",
        unit="frames per second",
        at_least=1,
        at_most=1000,
    )
    max_sequence_length: int | None = knob(
        None,
        "Longest prompt that the text encoder sees; null means the pipeline's default.",
        unit="tokens",
        at_least=1,
        at_most=65536,
    )
    negative_prompt: str | None = knob(
        None, "Text that guidance leads away from, used for every prompt.", found="words"
    )
