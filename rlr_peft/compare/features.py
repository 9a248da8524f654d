"""Features of images, by which sets of images are compared; from a network that is there already where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rlr_peft.errors import RewardError
from rlr_peft.foreign_text import shown_name
from rlr_peft.rewards.base import Reward
from rlr_peft.rewards.model_reward import ModelSettings, loading
from rlr_peft.rewards.registry import RewardSettings, load_reward
from rlr_peft.tiny_shapes import PIPELINE_NAME

THUMBNAILS, AUTO = "thumbnails", "auto"
THUMBNAIL_SIDE = 16  # pixels
DINO_SIDE = 224  # pixels of the shortest side
CLIP_TYPES = ("clip", "clip_vision_model")
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers")


class FeatureExtractor(Protocol):
    """Turns images into features.

    Attributes:
        name: what it is, in words for the page.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """(B, D) float32 on the CPU, of images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1]."""


class RewardFeatures:
    """The features in which a reward's network sees images.

    Args:
        reward: one with `image_features`.
    """

    def __init__(self, reward: Any) -> None:
        self._features = reward.image_features
        self.name = f"network of the reward {reward.name}"

    def __call__(self, images: Tensor) -> Tensor:
        return _over_frames(self._features, images)


class Thumbnails:
    """The pixels of the image at 16 x 16, less mid-gray: what is left where no network is at hand.

    They see layout and colours, not what is drawn; a model that draws one and the same image still shows.
    """

    name = f"thumbnails of {THUMBNAIL_SIDE} x {THUMBNAIL_SIDE} pixels"

    def __call__(self, images: Tensor) -> Tensor:
        def shrink(images: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(images.float(), THUMBNAIL_SIDE).flatten(1) - 0.5

        return _over_frames(shrink, images)


class VisionModelFeatures:
    """A vision model of `transformers`: CLIP's projected image embedding, or the class token of a ViT or DINOv2.

    Args:
        name: Hub id or local folder.
        settings: how it is held and where it runs.

    Raises:
        RewardError: it cannot be found or loaded, or is of another type.
    """

    def __init__(self, name: str, settings: ModelSettings) -> None:
        from transformers import AutoConfig, AutoModel

        from rlr_peft.rewards.clip_rewards import load_clip_vision
        from rlr_peft.rewards.model_reward import MODEL_FILES

        self._settings = settings
        user = f"features {name}"
        folder = settings.files.folder(user, name, *MODEL_FILES)
        with loading(user, folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self._is_clip = config.model_type in CLIP_TYPES
        if config.model_type not in CLIP_TYPES + DINO_TYPES:
            raise RewardError(
                f"--features {name}: expected a model of type {', '.join(CLIP_TYPES + DINO_TYPES)}, got "
                f"{config.model_type}; for example facebook/dinov2-base or openai/clip-vit-base-patch32"
            )
        if self._is_clip:
            network: Any = load_clip_vision(user, settings.files, name, settings.dtype)
        else:
            with loading(user, folder):
                network = AutoModel.from_pretrained(folder, dtype=settings.dtype, trust_remote_code=False)
        self._network = network.to(settings.device).eval().requires_grad_(False)
        self.name = shown_name(name)

    def __call__(self, images: Tensor) -> Tensor:
        return _over_frames(self._of_images, images)

    def _of_images(self, images: Tensor) -> Tensor:
        from rlr_peft.rewards.preprocessing import clip_pixels, imagenet_pixels

        network, images = self._network, images.to(self._settings.device)
        if self._is_clip:
            pixels = clip_pixels(images, network.config.image_size).to(network.dtype)
            return network(pixel_values=pixels).image_embeds
        patch = network.config.patch_size
        side = max(patch, min(DINO_SIDE, network.config.image_size) // patch * patch)
        pixels = imagenet_pixels(images, side, patch).to(network.dtype)
        resized = {"interpolate_pos_encoding": True} if network.config.model_type == "vit" else {}
        return network(pixel_values=pixels, **resized).last_hidden_state[:, 0]


def find_features(
    spec: str, base: str, rewards: Sequence[Reward], settings: ModelSettings | None = None
) -> FeatureExtractor:
    """The extractor that was asked for.

    Args:
        spec: `auto`, `thumbnails`, or the Hub id or folder of a vision model. `auto` takes the held-out judge on
            tiny-shapes; elsewhere the network of the last reward that has one, so that a held-out one comes before the
            one that was trained on; and thumbnails where there is none. It downloads nothing.
        base: the name of the base.
        rewards: all that are measured, held-out ones last.
        settings: how a vision model is held.

    Raises:
        RewardError: the model cannot be loaded.
    """
    settings = settings or ModelSettings()
    if spec == THUMBNAILS:
        return Thumbnails()
    if spec != AUTO:
        return VisionModelFeatures(spec, settings)
    if base == PIPELINE_NAME:
        return RewardFeatures(load_reward("tiny-shapes-heldout", RewardSettings(settings)))
    seeing = [part for reward in rewards for part in reward.parts if hasattr(part, "image_features")]
    return RewardFeatures(seeing[-1]) if seeing else Thumbnails()


@torch.no_grad()
def _over_frames(features: Any, images: Tensor) -> Tensor:
    """Of videos the mean over their frames."""
    if images.ndim == 4:
        return features(images).float().cpu()
    return features(images.flatten(0, 1)).float().cpu().unflatten(0, images.shape[:2]).mean(1)
