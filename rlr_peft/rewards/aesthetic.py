"""How beautiful people find the image: the LAION aesthetic predictor V2 (Schuhmann, 2022) on CLIP ViT-L/14."""

from __future__ import annotations

from torch import Tensor, nn

from rlr_peft.rewards.clip import OPENAI_CLIP, load_clip_vision, unit
from rlr_peft.rewards.linear_head import LinearHead
from rlr_peft.rewards.model_files import load_weights
from rlr_peft.rewards.model_reward import ModelSettings, SeeingReward
from rlr_peft.rewards.preprocessing import clip_pixels

HEAD = "trl-lib/ddpo-aesthetic-predictor"
# The same weights are spread under two names.
HEAD_FILES = ("aesthetic-model.safetensors", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")


class Aesthetic(SeeingReward):
    """The head on the unit image feature; the prompt is not looked at. The head is kept in float32."""

    def __init__(self, settings: ModelSettings) -> None:
        vision = load_clip_vision("aesthetic", settings.files, OPENAI_CLIP, settings.dtype)
        path = settings.files.find("aesthetic", HEAD, *HEAD_FILES)
        head = LinearHead("aesthetic", path, load_weights("aesthetic", path), vision.config.projection_dim)
        super().__init__("aesthetic", settings, nn.ModuleDict({"vision": vision, "head": head}))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32, on a scale of 1 to 10; photographs and paintings lie at 4 to 7."""
        scores: Tensor = self.network["head"](unit(self.features(images)))
        return scores

    def features(self, images: Tensor) -> Tensor:
        """(B, D) image embeddings."""
        vision = self.network["vision"]
        pixels = clip_pixels(images, vision.config.image_size)
        embeddings: Tensor = vision(pixel_values=pixels.to(vision.dtype)).image_embeds
        return embeddings
