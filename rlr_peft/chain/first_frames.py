"""The first frames of a video alone, where a whole decode costs too much."""

from collections.abc import Sequence
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


def first_frames(pipeline: Any, family: Family, num_frames: int, latents_shape: Sequence[int]) -> FirstFrames:
    """The part of the latents that decodes to exactly the first frames of the whole video.

    Args:
        pipeline: makes videos.
        family: its row.
        num_frames: how many frames are wanted.
        latents_shape: of one whole video's latents.

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
