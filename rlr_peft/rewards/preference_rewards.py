"""Networks that learnt which of two images people prefer, with their authors' weights in classes of `transformers`.

ImageReward (Xu et al., 2023) is BLIP's joint reading of image and prompt, HPSv3 (Ma et al., 2025) a Qwen2-VL-7B with a
head. Weights get the names of those classes; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    Qwen2VLModel,
)

from rlr_peft.rewards.base import Metadata
from rlr_peft.rewards.model_files import constant_in
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
from rlr_peft.rewards.vlm import QwenInputs

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


REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # of every image, whatever its shape
# The published names of the modules, and those of `Qwen2VLModel`.
_PREFIXES = {"model.": "language_model."}


class HPSv3(ModelReward):
    """The mean of the preference that the head predicts; its second output, the spread, is left alone.

    The head is kept in float32, and the rest in bf16 where others would be in fp16. The question that the model was
    trained with is read out of its authors' file.
    """

    def __init__(self, settings: ModelSettings) -> None:
        name = "hpsv3"
        folder, path, code = settings.files.of(name)
        self._question = constant_in(name, code, "INSTRUCTION")
        self._ending = constant_in(name, code, "prompt_with_special_token")
        with loading(name, folder):
            config = AutoConfig.from_pretrained(folder)
            size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
            self._inputs = QwenInputs(name, folder, config, size=size)
        self._inputs.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        self._reward_token = self._inputs.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        weights, head = load_weights(name, path), _head(config.text_config.hidden_size)
        super().__init__(name, settings, qwen2_vl_network(name, path, weights, config, head, settings.dtype))

    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """(B,) float32, about -5 to 15."""
        questions = [self._question.format(text_prompt=prompt) + self._ending for prompt in prompts]
        inputs = self._inputs(images, questions)
        model, ids = self.network["model"], inputs["input_ids"]
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        states = read_as_plain_text(model, inputs, seen, model.config.image_token_id)
        # The prompt may name the token too: the question's own is the last one.
        last = ids.shape[1] - 1 - (ids == self._reward_token).flip(1).int().argmax(1)
        scores: Tensor = self.network["head"](states[torch.arange(len(ids)), last].float())[:, 0]
        return scores


def read_as_plain_text(model: Any, inputs: Mapping[str, Tensor], seen: Sequence[Tensor], token: int) -> Tensor:
    """The last states (B, L, D) of a Qwen2-VL that was trained without the places of rows, columns and frames.

    Args:
        model: the `Qwen2VLModel`.
        inputs: `input_ids` and `attention_mask` (B, L).
        seen: features of each sample's image or video.
        token: what stands in the text for one of them.
    """
    ids = inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    is_seen = (ids == token)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(is_seen, torch.cat(list(seen)).to(embeddings))
    places = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
    states: Tensor = model.language_model(
        inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], position_ids=places
    ).last_hidden_state
    return states


def qwen2_vl_network(
    reward_name: str, path: Path, checkpoint: Mapping[str, Tensor], config: Any, head: nn.Module, dtype: torch.dtype
) -> nn.ModuleDict:
    """`model` and `head`, filled.

    Args:
        reward_name: for errors.
        path: of the checkpoint, for errors.
        checkpoint: weights under the names of older `transformers`; those of the head begin with `rm_head`.
        config: of the Qwen2-VL.
        head: kept in float32.
        dtype: of the rest; bf16 in place of fp16.

    Raises:
        RewardError: weights are missing or unknown.
    """
    weights: dict[str, Tensor] = {}
    for name, value in checkpoint.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        weights[_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = value
    weights.pop("lm_head.weight", None)  # it writes no word
    head_weights = {name: weights.pop(name).float() for name in list(weights) if name.startswith("rm_head.")}
    config.text_config.vocab_size = len(weights["language_model.embed_tokens.weight"])
    heads = nn.ModuleDict({"rm_head": head})
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    with loading(reward_name, path):
        model, info = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
        loaded = heads.load_state_dict(head_weights, strict=False)
    missing = [*info["missing_keys"], *loaded.missing_keys]
    check_keys(reward_name, path, missing, [*info["unexpected_keys"], *loaded.unexpected_keys])
    return nn.ModuleDict({"model": model, "head": head})


def _head(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
