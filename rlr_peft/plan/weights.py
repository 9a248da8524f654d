"""Bytes of weights: of a base, of the adapter's optimiser, of what quantisation leaves, and of the built-in rewards.

The rewards' networks are known architectures, so that their memory is known before a download.
"""

from collections.abc import Iterable, Mapping
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

from rlr_peft.byte_counters import LiveMemory, fused_attention

# bitsandbytes' block sizes: 4-bit weights, their scales when these are quantised again, and 8-bit Adam's states.
BLOCK_4BIT, BLOCK_OF_SCALES, BLOCK_8BIT_ADAM = 64, 256, 256
# Smaller tensors keep their Adam state in float32.
MIN_8BIT_SIZE = 4096


def weight_bytes(
    model: nn.Module, without: Iterable[nn.Parameter] = (), quantization: Mapping[str, Any] | None = None
) -> int:
    """Bytes of parameters and buffers, each once.

    Args:
        model: on any device.
        without: parameters that are counted elsewhere, the adapter's.
        quantization: arguments of BitsAndBytesConfig; its linear layers are then held in 4 or 8 bits.
    """
    excluded = {id(parameter) for parameter in without}
    quantized = _quantized_weights(model, quantization or {}, excluded)
    total = 0
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        if id(tensor) in quantized:
            total += round(quantized[id(tensor)])
        elif id(tensor) not in excluded:
            total += tensor.numel() * tensor.element_size()
    return total


def largest_quantized(model: nn.Module, quantization: Mapping[str, Any] | None, without: Iterable[nn.Parameter]) -> int:
    """Elements of the largest quantised matrix: it is held in full width while it multiplies."""
    quantized = _quantized_weights(model, quantization or {}, {id(parameter) for parameter in without})
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return max((sizes[key] for key in quantized), default=0)


# Float32 numbers that an optimiser keeps of every weight; Adafactor keeps those of rows and columns alone.
STATES = {"AdamW": 2, "Adafactor": 0, "Lion": 1, "Muon": 1, "Prodigy": 4}


def optimizer_bytes(parameters: Iterable[nn.Parameter], optimizer: str, use_8bit_adam: bool) -> int:
    """Bytes of an optimiser's state in float32, or of AdamW's in 8 bits with a scale for each block."""
    total = 0.0
    for parameter in parameters:
        size = parameter.numel()
        if optimizer == "AdamW" and use_8bit_adam and size >= MIN_8BIT_SIZE:
            total += 2 * size * (1 + 4 / BLOCK_8BIT_ADAM)
        elif optimizer == "Adafactor" and parameter.ndim > 1:
            total += 4 * (size // parameter.shape[-1] + size // parameter.shape[-2])
        else:
            total += 4 * size * max(STATES[optimizer], 1)
    return round(total)


def _quantized_weights(model: nn.Module, quantization: Mapping[str, Any], excluded: set[int]) -> dict[int, float]:
    """Bytes of every quantised matrix by its id."""
    if not quantization:
        return {}
    skipped = list(quantization.get("llm_int8_skip_modules") or [])
    found = {}
    for name, module in model.named_modules():
        is_skipped = any(skip in name.split(".") or name.startswith(f"{skip}.") or name == skip for skip in skipped)
        if isinstance(module, nn.Linear) and id(module.weight) not in excluded and not is_skipped:
            found[id(module.weight)] = _bytes_of_matrix(module.weight, quantization)
    return found


def _bytes_of_matrix(weight: torch.Tensor, quantization: Mapping[str, Any]) -> float:
    size, rows = weight.numel(), weight.shape[0]
    if quantization.get("load_in_8bit"):
        return size + 4 * rows  # one float32 scale for each row
    scales = size / BLOCK_4BIT
    if quantization.get("bnb_4bit_use_double_quant"):
        return size / 2 + scales + 4 * scales / BLOCK_OF_SCALES
    return size / 2 + 4 * scales


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


def reward_names(spec: Any) -> list[str]:
    """The names in `reward_fn` or `heldout_reward_fn`, which may be none, one, several, or weighted."""
    return [spec] if isinstance(spec, str) else list(spec or ())


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
