"""The networks of the built-in rewards: known architectures, so that their memory is known before a download."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from rlr_peft.evaluation.memory_plan.live_memory import LiveMemory, fused_attention
from rlr_peft.evaluation.memory_plan.weights import weight_bytes

VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 768,
}
VIT_H_14 = VIT_L_14 | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "projection_dim": 1024,
}
TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# ImageReward: BLIP's ViT-L/16 and a BERT with cross-attention.
BLIP_VISION = VIT_L_14 | {"patch_size": 16}
BLIP_TEXT = TEXT_L | {"vocab_size": 30524, "encoder_hidden_size": 1024, "is_decoder": True}


@dataclass(frozen=True)
class RewardMemory:
    """What a reward's network holds, in bytes.

    Attributes:
        weights: all the time.
        scoring: the most, besides, while images are scored and differentiated.
    """

    weights: int
    scoring: int


def reward_memory(name: str, batch_size: int, dtype: torch.dtype = torch.float32) -> RewardMemory | None:
    """The memory of a registered reward; None where nothing is known about it (the user's own).

    Args:
        name: of a reward.
        batch_size: images scored at once.
        dtype: of the network's weights.
    """
    base, _, _ = name.partition("/")
    if base.startswith(("jpeg-", "tiny-shapes", "temporal-flicker")) or base.startswith(("http:", "https:")):
        return RewardMemory(0, 0)  # small, on the CPU, or elsewhere
    with torch.device("meta"):
        model = _network(base)
    if model is None:
        return None
    model.to(dtype).requires_grad_(False).eval()
    vision = getattr(model, "vision_model", model)
    pixels = torch.zeros(batch_size, 3, 224, 224, device="meta", dtype=dtype, requires_grad=True)
    with fused_attention(), LiveMemory() as memory:
        states = vision(pixel_values=pixels)[0]
        torch.autograd.grad(states, pixels, torch.zeros_like(states))
    return RewardMemory(weight_bytes(model), memory.peak)


def reward_names(*specs: Any) -> list[str]:
    """The names in `reward_fn` and `heldout_reward_fn`, each of which may be none, one, several, or weighted."""
    lists = [[spec] if isinstance(spec, str) else list(spec or ()) for spec in specs]
    return list(dict.fromkeys(name for names in lists for name in names))


def _network(name: str) -> nn.Module | None:
    if name == "aesthetic":
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_L_14))
    if name == "clipscore":
        return CLIPModel(CLIPConfig(text_config=TEXT_L, vision_config=VIT_L_14, projection_dim=768))
    if name in ("pickscore", "hpsv2"):
        return CLIPModel(CLIPConfig(text_config=TEXT_H, vision_config=VIT_H_14, projection_dim=1024))
    if name == "imagereward":
        vision = BlipVisionModel(BlipVisionConfig(**BLIP_VISION))
        vision.text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False)
        return vision
    return None
