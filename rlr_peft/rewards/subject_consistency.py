"""Whether the subject of a video stays the same."""

from __future__ import annotations

from torch import Tensor
from transformers import ViTModel

from rlr_peft.rewards.clip import MODEL_FILES, unit
from rlr_peft.rewards.model_reward import ModelReward, ModelSettings, loading
from rlr_peft.rewards.preprocessing import vbench_pixels
from rlr_peft.rewards.temporal_flicker import check_length

DINO = "facebook/dino-vitb16"


class SubjectConsistency(ModelReward):
    """Mean over the later frames of their DINO feature's cosine to the first and to the previous frame: VBench's.

    Negative cosines count as 0, as there.
    """

    takes_video = True

    def __init__(self, settings: ModelSettings) -> None:
        folder = settings.files.folder("subject-consistency", DINO, *MODEL_FILES)
        with loading("subject-consistency", folder):
            network = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=settings.dtype)
        super().__init__("subject-consistency", settings, network)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32 in [0, 1] of videos (B, F, 3, H, W), F >= 2; prompts are not looked at."""
        check_length(self.name, images)
        # What is left of a side beyond whole patches is cut off by the network itself, as in the original.
        pixels = vbench_pixels(images.flatten(0, 1), self.network.config.image_size).to(self.network.dtype)
        tokens = self.network(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        features = unit(tokens[:, 0]).unflatten(0, images.shape[:2])
        to_first = (features[:, 1:] * features[:, :1]).sum(-1)
        to_previous = (features[:, 1:] * features[:, :-1]).sum(-1)
        return ((to_first.clamp(min=0) + to_previous.clamp(min=0)) / 2).mean(1)
