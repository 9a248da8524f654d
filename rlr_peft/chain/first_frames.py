"""The first frames of a video alone, where a whole decode costs too much."""

from dataclasses import dataclass
from typing import Any

from rlr_peft.chain.families import Family


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


def first_frames(pipeline: Any, family: Family, num_frames: int) -> FirstFrames:
    """The part of the latents that decodes to exactly the first frames of the whole video.

    Args:
        pipeline: makes videos.
        family: its row.
        num_frames: how many frames are wanted.

    Raises:
        ValueError: the family's decoder looks at later frames too, or the frames do not fall on a latent frame's end.
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
    return FirstFrames(num_frames, (num_frames - 1) // ratio + 1, family.frame_axis)
