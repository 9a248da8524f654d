"""Rewards that compare image and prompt with a CLIP model: CLIPScore, PickScore, HPSv2."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rlr_peft.rewards.clip import (
    LAION_CLIP,
    OPENAI_CLIP,
    clip_cosine,
    clip_image_features,
    load_clip,
    load_clip_tokenizer,
)
from rlr_peft.rewards.model_files import load_weights
from rlr_peft.rewards.model_reward import ModelSettings, SeeingReward
from rlr_peft.rewards.open_clip_weights import clip_from_open_clip
from rlr_peft.rewards.preprocessing import clip_pixels, padded_clip_pixels

PICKSCORE = "yuvalkirstain/PickScore_v1"
HPSV2 = "xswu/HPSv2"
HPSV2_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class ClipScore(SeeingReward):
    """100 times the cosine of image and prompt in OpenAI's CLIP ViT-L/14 (Hessel et al., 2021), with no floor at 0."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__("clipscore", settings, load_clip("clipscore", settings.files, OPENAI_CLIP, settings.dtype))
        self._tokenizer = load_clip_tokenizer("clipscore", settings.files, OPENAI_CLIP)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32, about 15 to 35."""
        pixels = clip_pixels(images, self.network.config.vision_config.image_size)
        return 100 * clip_cosine(self.network, self._tokenizer, pixels, prompts)

    def features(self, images: Tensor) -> Tensor:
        """(B, D) image embeddings."""
        return clip_image_features(self.network, clip_pixels(images, self.network.config.vision_config.image_size))


class PickScore(SeeingReward):
    """Human preference learnt from Pick-a-Pic (Kirstain et al., 2023): scaled cosine in a fine-tuned CLIP ViT-H/14."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__("pickscore", settings, load_clip("pickscore", settings.files, PICKSCORE, settings.dtype))
        self._tokenizer = load_clip_tokenizer("pickscore", settings.files, LAION_CLIP)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32, about 17 to 24."""
        pixels = clip_pixels(images, self.network.config.vision_config.image_size)
        cosine = clip_cosine(self.network, self._tokenizer, pixels, prompts)
        return self.network.logit_scale.float().exp() * cosine

    def features(self, images: Tensor) -> Tensor:
        """(B, D) image embeddings."""
        return clip_image_features(self.network, clip_pixels(images, self.network.config.vision_config.image_size))


class HPSv2(SeeingReward):
    """Human preference score v2 (Wu et al., 2023): cosine in a fine-tuned CLIP ViT-H/14.

    Args:
        version: of the checkpoint, which is in open_clip's format and converted on load.
        settings: how the network is held.
    """

    def __init__(self, version: Literal["v2.0", "v2.1"], settings: ModelSettings) -> None:
        name = f"hpsv2/{version}"
        file = HPSV2_FILES[version]
        path = settings.files.find(name, HPSV2, file.replace(".pt", ".safetensors"), file)
        network = clip_from_open_clip(name, path, load_weights(name, path), settings.dtype)
        super().__init__(name, settings, network)
        self._tokenizer = load_clip_tokenizer(name, settings.files, LAION_CLIP)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32, about 0.2 to 0.35."""
        pixels = padded_clip_pixels(images, self.network.config.vision_config.image_size)
        return clip_cosine(self.network, self._tokenizer, pixels, prompts)

    def features(self, images: Tensor) -> Tensor:
        """(B, D) image embeddings."""
        return clip_image_features(
            self.network, padded_clip_pixels(images, self.network.config.vision_config.image_size)
        )
