"""ImageReward (Xu et al., 2023): human preference from BLIP's joint reading of image and prompt.

The checkpoint's weights get the names of the BLIP classes of `transformers`; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.model_reward import (
    LinearHead,
    ModelReward,
    ModelSettings,
    check_keys,
    depth_of,
    load_weights,
    loading,
)
from rlr_peft.rewards.preprocessing import clip_pixels

MAX_LENGTH = 35  # tokens; longer prompts are cut off, as in training
# Mean and standard deviation of the raw score over the authors' data.
MEAN, STD = 0.16717183, 1.03334


class ImageReward(ModelReward):
    """The score is standardised: 0 is an average image for its prompt. The head is kept in float32."""

    def __init__(self, settings: ModelSettings) -> None:
        path, words = settings.files.of("imagereward")
        network = image_reward_network("imagereward", path, load_weights("imagereward", path), settings.dtype)
        super().__init__("imagereward", settings, network)
        with loading("imagereward", words):
            self._tokenizer = BertTokenizer.from_pretrained(words.parent, do_lower_case=True)

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, about -2 to 2."""
        vision, text, head = (self.network[name] for name in ("vision", "text", "head"))
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(images.device)
        pixels = clip_pixels(images, vision.config.image_size).to(vision.dtype)
        patches = vision(pixel_values=pixels).last_hidden_state
        read = text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
        ).last_hidden_state
        raw: Tensor = head(read[:, 0].float())
        return (raw - MEAN) / STD


HEAD_WIDTH = 64  # of an attention head in ViT and BERT of every size

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_IN_A_BLOCK = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}


def image_reward_network(
    reward_name: str, path: Path, checkpoint: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.ModuleDict:
    """`vision`, `text` and `head`, filled.

    Raises:
        RewardError: weights are missing or unknown.
    """
    vision_weights = _vision_weights(_below(checkpoint, "blip.visual_encoder."))
    text_weights = _below(checkpoint, "blip.text_encoder.")
    text_weights.pop("embeddings.position_ids", None)  # a constant
    head_weights = _below(checkpoint, "mlp.")
    with loading(reward_name, path):
        vision = BlipVisionModel(_vision_config(vision_weights))
        text = BlipTextModel(_text_config(text_weights, vision.config.hidden_size), add_pooling_layer=False)
    prefixes = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    unknown = [name for name in checkpoint if not name.startswith(prefixes)]
    for module, weights in ((vision, vision_weights), (text, text_weights)):
        loaded = module.load_state_dict(weights, strict=False)
        check_keys(reward_name, path, loaded.missing_keys, [*loaded.unexpected_keys, *unknown])
    head = LinearHead(reward_name, path, head_weights, text.config.hidden_size)
    return nn.ModuleDict({"vision": vision.to(dtype), "text": text.to(dtype), "head": head})


def _below(checkpoint: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in checkpoint.items() if name.startswith(prefix)}


def _vision_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of `transformers`; unknown ones keep their names."""
    converted = {}
    for name, value in weights.items():
        if name.startswith("blocks."):
            _, number, inner = name.split(".", 2)
            converted[f"encoder.layers.{number}.{_renamed(inner, _IN_A_BLOCK)}"] = value
        else:
            converted[_renamed(name, _VISION)] = value
    return converted


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _vision_config(weights: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch_size, _ = weights["embeddings.patch_embedding.weight"].shape
    grid = round((weights["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth_of(weights, "encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=grid * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def _text_config(weights: Mapping[str, Tensor], vision_width: int) -> BlipTextConfig:
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=depth_of(weights, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        # Only a decoder has the cross-attention to the image; its self-attention is bidirectional all the same.
        is_decoder=True,
        pad_token_id=0,
    )
