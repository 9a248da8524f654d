"""From an open_clip checkpoint of a ViT CLIP to `transformers.CLIPModel`: other names, the same numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from rlr_peft.rewards.model_files import check_keys
from rlr_peft.rewards.model_reward import loading

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
        dtype: of the result.

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
            "num_hidden_layers": _depth(weights, "visual.transformer"),
            "num_attention_heads": NUM_HEADS,
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "hidden_act": "gelu",
            "projection_dim": projection,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _depth(weights, "transformer"),
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


def _depth(weights: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}.resblocks."
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix))
