"""How steady the picture of a video is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlr_peft.rewards.errors import RewardError


class TemporalFlicker:
    """One minus the mean absolute difference of neighbouring frames, in [0, 1]: VBench's temporal flickering.

    A still image scores 1, so that it should be held against a reward that asks for motion.
    """

    name = "temporal-flicker"
    differentiable = True
    takes_video = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) float32 of videos (B, F, 3, H, W), F >= 2; prompts and metadata are not looked at."""
        check_length(self.name, images)
        videos = images.float()
        return 1 - (videos[:, 1:] - videos[:, :-1]).abs().mean((1, 2, 3, 4))


def check_length(name: str, videos: Tensor) -> None:
    """Raises RewardError for videos (B, F, 3, H, W) of a single frame."""
    if videos.shape[1] < 2:
        raise RewardError(f"reward '{name}': expected videos of 2 frames or more, got {videos.shape[1]}")
