"""Rewards with a CLIP or SigLIP model of `transformers`: CLIPScore, PickScore, HPSv2 and two aesthetic predictors.

HPSv2's checkpoint is in open_clip's format: other names, the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection, SiglipVisionModel

from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.model_reward import (
    LinearHead,
    ModelSettings,
    SeeingReward,
    check_keys,
    depth_of,
    load_weights,
    loading,
    unit,
)
from rlr_peft.rewards.preprocessing import clip_pixels, padded_clip_pixels, squared_pixels


class ClipReward(SeeingReward):
    """A reward that compares image and prompt with a CLIPModel."""

    def __init__(self, name: str, settings: ModelSettings, network: CLIPModel, words: Path) -> None:
        super().__init__(name, settings, network)
        with loading(name, words):
            self._tokenizer = CLIPTokenizer.from_pretrained(words)

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, size, size), preprocessed."""
        return clip_pixels(images, self.network.config.vision_config.image_size)

    def features(self, images: Tensor) -> Tensor:
        """(B, D) projected image embeddings, not normalised."""
        pixels = self.pixels(images).to(self.network.dtype)
        embeddings: Tensor = self.network.get_image_features(pixel_values=pixels).pooler_output
        return embeddings

    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float32 in [-1, 1], of the features of every image and its prompt.

        What of a prompt is beyond the model's text length is cut off.
        """
        # What follows the end of the text has no influence on it in a causal text model, so no mask is needed.
        ids = self._tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids.to(images.device)
        with torch.no_grad():
            text = unit(self.network.get_text_features(input_ids=ids).pooler_output)
        return (unit(self.features(images)) * text).sum(-1)


class ClipScore(ClipReward):
    """100 times the cosine of image and prompt in OpenAI's CLIP ViT-L/14 (Hessel et al., 2021), with no floor at 0."""

    def __init__(self, settings: ModelSettings) -> None:
        (folder,) = settings.files.of("clipscore")
        super().__init__("clipscore", settings, _load_clip("clipscore", folder, settings.dtype), folder)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, about 15 to 35."""
        return 100 * self.cosine(images, prompts)


class PickScore(ClipReward):
    """Human preference learnt from Pick-a-Pic (Kirstain et al., 2023): scaled cosine in a fine-tuned CLIP ViT-H/14."""

    def __init__(self, settings: ModelSettings) -> None:
        folder, words = settings.files.of("pickscore")
        super().__init__("pickscore", settings, _load_clip("pickscore", folder, settings.dtype), words)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, about 17 to 24."""
        return self.network.logit_scale.float().exp() * self.cosine(images, prompts)


class HPSv2(ClipReward):
    """Human preference score v2 (Wu et al., 2023): cosine in a fine-tuned CLIP ViT-H/14.

    Args:
        version: of the checkpoint, which is in open_clip's format and converted on load.
    """

    def __init__(self, version: Literal["v2.0", "v2.1"], settings: ModelSettings) -> None:
        name = f"hpsv2/{version}"
        path, words = settings.files.of(name)
        network = clip_from_open_clip(name, path, load_weights(name, path), settings.dtype)
        super().__init__(name, settings, network, words)

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, size, size), preprocessed as HPSv2 does it."""
        return padded_clip_pixels(images, self.network.config.vision_config.image_size)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, about 0.2 to 0.35."""
        return self.cosine(images, prompts)


class HeadReward(SeeingReward):
    """How beautiful people find the image, by a head on its unit feature; the head is kept in float32."""

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, on a scale of 1 to 10."""
        scores: Tensor = self.network["head"](unit(self.features(images)))
        return scores


class Aesthetic(HeadReward):
    """The LAION aesthetic predictor V2 (Schuhmann, 2022) on CLIP ViT-L/14; photographs and paintings get 4 to 7."""

    def __init__(self, settings: ModelSettings) -> None:
        folder, path = settings.files.of("aesthetic")
        vision = load_clip_vision("aesthetic", folder, settings.dtype)
        head = LinearHead("aesthetic", path, load_weights("aesthetic", path), vision.config.projection_dim)
        super().__init__("aesthetic", settings, nn.ModuleDict({"vision": vision, "head": head}))

    def features(self, images: Tensor) -> Tensor:
        """(B, D) image embeddings."""
        vision = self.network["vision"]
        pixels = clip_pixels(images, vision.config.image_size)
        embeddings: Tensor = vision(pixel_values=pixels.to(vision.dtype)).image_embeds
        return embeddings


class AestheticV25(HeadReward):
    """Aesthetic Predictor V2.5 (discus0434, 2024) on SigLIP, for photos and drawings; 5.5 and more is very good."""

    def __init__(self, settings: ModelSettings) -> None:
        name = "aesthetic-v2.5"
        folder, path = settings.files.of(name)
        with loading(name, folder):
            vision = SiglipVisionModel.from_pretrained(folder, dtype=settings.dtype)
        weights = {key.replace("scoring_head.", "layers."): value for key, value in load_weights(name, path).items()}
        head = LinearHead(name, path, weights, vision.config.hidden_size)
        super().__init__(name, settings, nn.ModuleDict({"vision": vision, "head": head}))

    def features(self, images: Tensor) -> Tensor:
        """(B, D) image embeddings."""
        vision = self.network["vision"]
        pixels = squared_pixels(images, vision.config.image_size)
        features: Tensor = vision(pixel_values=pixels.to(vision.dtype)).pooler_output
        return features


def load_clip_vision(reward_name: str, folder: Path, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """The image tower of a CLIP model and its projection."""
    with loading(reward_name, folder):
        return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=dtype)


def _load_clip(reward_name: str, folder: Path, dtype: torch.dtype) -> CLIPModel:
    with loading(reward_name, folder):
        return CLIPModel.from_pretrained(folder, dtype=dtype)


# The weights do not tell how many heads they are meant for; both towers of ViT-H/14 have 16.
NUM_HEADS = 16

_PLAIN = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# Kept by open_clip as matrices that features are multiplied with from the right.
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_A_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def clip_from_open_clip(reward_name: str, path: Path, checkpoint: Mapping[str, Any], dtype: torch.dtype) -> CLIPModel:
    """Build and fill a CLIPModel.

    Args:
        reward_name: named in errors.
        path: of the checkpoint, named in errors.
        checkpoint: open_clip's weights, or a mapping that holds them as `state_dict`.

    Raises:
        RewardError: weights are missing or unknown.
    """
    weights: Mapping[str, Tensor] = checkpoint.get("state_dict", checkpoint)
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    with loading(reward_name, path):
        model = CLIPModel(_config_of(weights))
    loaded = model.load_state_dict(convert_open_clip(weights), strict=False)
    missing = [name for name in loaded.missing_keys if not name.endswith("position_ids")]
    check_keys(reward_name, path, missing, loaded.unexpected_keys)
    return model.to(dtype)


def convert_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of `transformers`; unknown ones keep their names."""
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        block = _BLOCK.fullmatch(name)
        if name == "attn_mask":  # a constant, the causal mask
            continue
        if name in _PLAIN:
            converted[_PLAIN[name]] = value
        elif name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = value.T.contiguous()
        elif block is None:
            converted[name] = value
        else:
            tower = "vision_model" if block[1] else "text_model"
            converted.update(_convert_in_block(f"{tower}.encoder.layers.{block[2]}", block[3], value))
    return converted


def _convert_in_block(prefix: str, name: str, value: Tensor) -> dict[str, Tensor]:
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        return {
            f"{prefix}.self_attn.{part}_proj.{kind}": piece for part, piece in zip("qkv", value.chunk(3), strict=True)
        }
    module, _, kind = name.rpartition(".")
    return {f"{prefix}.{_IN_A_BLOCK.get(module, module)}.{kind}": value}


def _config_of(weights: Mapping[str, Tensor]) -> CLIPConfig:
    """All sizes are in the shapes, but for the number of heads."""
    vision_width, _, patch_size, _ = weights["visual.conv1.weight"].shape
    grid = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    vocabulary, text_width = weights["token_embedding.weight"].shape
    projection = weights["text_projection"].shape[1]
    return CLIPConfig(
        projection_dim=projection,
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth_of(weights, "visual.transformer.resblocks."),
            "num_attention_heads": NUM_HEADS,
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "hidden_act": "gelu",
            "projection_dim": projection,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth_of(weights, "transformer.resblocks."),
            "num_attention_heads": NUM_HEADS,
            "max_position_embeddings": weights["positional_embedding"].shape[0],
            "vocab_size": vocabulary,
            "hidden_act": "gelu",
            "projection_dim": projection,
            # The end of the text is the last token of CLIP's vocabulary; its features are the text's.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
    )
