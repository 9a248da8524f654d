"""Aesthetic Predictor V2.5 (discus0434, 2024): a head on SigLIP's image features, for photos and drawings."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import SiglipVisionModel

from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.model_reward import (
    LinearHead,
    ModelSettings,
    SeeingReward,
    load_weights,
    loading,
    unit,
)
from rlr_peft.rewards.preprocessing import squared_pixels


class AestheticV25(SeeingReward):
    """The head reads the unit image feature and is kept in float32; the prompt is not looked at."""

    def __init__(self, settings: ModelSettings) -> None:
        name = "aesthetic-v2.5"
        folder, path = settings.files.of(name)
        with loading(name, folder):
            vision = SiglipVisionModel.from_pretrained(folder, dtype=settings.dtype)
        weights = {key.replace("scoring_head.", "layers."): value for key, value in load_weights(name, path).items()}
        head = LinearHead(name, path, weights, vision.config.hidden_size)
        super().__init__(name, settings, nn.ModuleDict({"vision": vision, "head": head}))

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, on a scale of 1 to 10; 5.5 and more is very good."""
        scores: Tensor = self.network["head"](unit(self.features(images)))
        return scores

    def features(self, images: Tensor) -> Tensor:
        """(B, D) image embeddings."""
        vision = self.network["vision"]
        pixels = squared_pixels(images, vision.config.image_size)
        features: Tensor = vision(pixel_values=pixels.to(vision.dtype)).pooler_output
        return features
