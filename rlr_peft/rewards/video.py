"""Rewards of whole videos: how steady the picture is, and whether the subject stays the same."""

from __future__ import annotations

from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading, unit
from rlr_peft.rewards.preprocessing import vbench_pixels


class TemporalFlicker(Reward):
    """One minus the mean absolute difference of neighbouring frames, in [0, 1]: VBench's temporal flickering.

    A still image scores 1, so that it should be held against a reward that asks for motion.
    """

    name = "temporal-flicker"
    differentiable = True
    takes_video = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Of videos (B, F, 3, H, W), F >= 2; prompts and metadata are not looked at."""
        _check_length(self.name, images)
        videos = images.float()
        return Scored(1 - (videos[:, 1:] - videos[:, :-1]).abs().mean((1, 2, 3, 4)))


class SubjectConsistency(ModelReward):
    """Mean over the later frames of their DINO feature's cosine to the first and to the previous frame: VBench's.

    Negative cosines count as 0, as there.
    """

    takes_video = True

    def __init__(self, settings: ModelSettings) -> None:
        from transformers import ViTModel

        (folder,) = settings.files.of("subject-consistency")
        with loading("subject-consistency", folder):
            network = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=settings.dtype)
        super().__init__("subject-consistency", settings, network)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32 in [0, 1] of videos (B, F, 3, H, W), F >= 2; prompts are not looked at."""
        _check_length(self.name, images)
        # What is left of a side beyond whole patches is cut off by the network itself, as in the original.
        pixels = vbench_pixels(images.flatten(0, 1), self.network.config.image_size).to(self.network.dtype)
        tokens = self.network(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        features = unit(tokens[:, 0]).unflatten(0, images.shape[:2])
        to_first = (features[:, 1:] * features[:, :1]).sum(-1)
        to_previous = (features[:, 1:] * features[:, :-1]).sum(-1)
        return ((to_first.clamp(min=0) + to_previous.clamp(min=0)) / 2).mean(1)


def _check_length(name: str, videos: Tensor) -> None:
    """Raises RewardError for videos (B, F, 3, H, W) of a single frame."""
    if videos.shape[1] < 2:
        raise RewardError(f"reward '{name}': expected videos of 2 frames or more, got {videos.shape[1]}")
