"""Bytes of rewards' networks, which are known architectures, so that their memory is known before a download."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from rlr_peft.byte_counters import LiveMemory, fused_attention
from rlr_peft.config.reward import OCR_PREFIX, VLM_PREFIX, model_in
from rlr_peft.errors import RewardError
from rlr_peft.plan.measurements import weight_bytes
from rlr_peft.redaction import is_address
from rlr_peft.rewards.model_files import ModelFiles
from rlr_peft.rewards.names import BLACK_BOXES
from rlr_peft.rewards.vlm import QWEN, SMOL

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
SIGLIP_SO400M = VIT_L_14 | {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 384}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 151658,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14}
# ImageReward: BLIP's ViT-L/16 and a BERT with cross-attention.
BLIP_VISION = VIT_L_14 | {"patch_size": 16}
BLIP_TEXT = TEXT_L | {"vocab_size": 30524, "encoder_hidden_size": 1024, "is_decoder": True}


@dataclass(frozen=True)
class RewardMemory:
    """What a reward's network holds, in bytes.

    Attributes:
        weights: all the time.
        scoring: the most, besides, while images are scored and, where asked for, differentiated; 0 where only the
            weights are known.
    """

    weights: int
    scoring: int


def is_black_box(name: str, files: ModelFiles, endpoint: str | None) -> bool:
    """Whether a reward is known to have no gradient.

    It is not of people's own, and of judges whose config is not at hand.

    Args:
        files: where the configs of judges come from.
        endpoint: behind which judges are; None where they are loaded.
    """
    if name in BLACK_BOXES or is_address(name) or name.startswith(OCR_PREFIX):
        return True
    if not name.startswith(VLM_PREFIX) or endpoint is not None:
        return name.startswith(VLM_PREFIX)
    config = _config_of(name, files)
    return config is not None and config.model_type not in (*QWEN, *SMOL)


def reward_memory(
    name: str,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    pixels: int = 512 * 512,
    files: ModelFiles | None = None,
    with_gradient: bool = True,
) -> RewardMemory | None:
    """The memory of a registered reward or a judge; None where nothing is known about it.

    Args:
        dtype: of the network's weights; of judges, bf16 where it is fp16.
        pixels: of an image, for judges; all others bring it to a size of their own.
        files: where the configs of judges come from.
    """
    base, _, _ = name.partition("/")
    if name == "ocr" or base.startswith(("jpeg-", "tiny-shapes", "temporal-flicker", "http:", "https:")):
        return RewardMemory(0, 0)  # small, on the CPU, or elsewhere
    if model_in(name) is not None or name in QUESTION_TOKENS:
        return _judge_memory(name, batch_size, dtype, pixels, files or ModelFiles(), with_gradient)
    with torch.device("meta"):
        model = _network(base)
    if model is None:
        return None
    model.to(dtype).requires_grad_(False).eval()
    with_gradient &= name not in BLACK_BOXES
    vision: Any = model.get_submodule("boxes.owlv2") if name == "detector" else model
    vision = getattr(vision, "vision_model", vision)
    side = vision.config.image_size
    images = torch.zeros(batch_size, 3, side, side, device="meta", dtype=dtype, requires_grad=with_gradient)
    with fused_attention(), LiveMemory() as memory:
        states = vision(pixel_values=images)[0]
        if with_gradient:
            torch.autograd.grad(states, images, torch.zeros_like(states))
    return RewardMemory(weight_bytes(model), memory.peak)


# Whatever the size of the image; of a video of five seconds ten frames, two of which make a patch.
SEEN_PIXELS = {"hpsv3": 256 * 28 * 28, "videoreward": 5 * 200_704}
MOST_PIXELS = 1280 * 28 * 28  # that the Qwen-VL processors take by default
QUESTION_TOKENS = {"hpsv3": 700, "unifiedreward": 700, "videoreward": 700}
SENTENCE_TOKENS = 60


def _judge_memory(
    name: str, batch_size: int, dtype: torch.dtype, pixels: int, files: ModelFiles, with_gradient: bool
) -> RewardMemory | None:
    with torch.device("meta"):
        judge = _judge(name, files)
    if judge is None:
        return None
    judge.to(torch.bfloat16 if dtype == torch.float16 else dtype).requires_grad_(False).eval()
    model = getattr(judge, "model", judge)
    with_gradient &= name not in BLACK_BOXES and not name.startswith(OCR_PREFIX)
    if hasattr(model, "visual"):
        seen = SEEN_PIXELS.get(name, min(pixels, MOST_PIXELS))
        given, see = _qwen_patches(model, batch_size, seen, with_gradient), partial(_qwen_sees, model, batch_size)
    elif judge.config.model_type in SMOL:
        given = _smol_tiles(model, batch_size, _tiles(name, files), with_gradient)
        see = partial(_smol_sees, model, batch_size)
    else:
        return RewardMemory(weight_bytes(judge), 0)  # a black box of unknown parts
    return RewardMemory(weight_bytes(judge), _asking(model, given, see, QUESTION_TOKENS.get(name, SENTENCE_TOKENS)))


def _judge(name: str, files: ModelFiles) -> Any:
    """A vision-language model; None if its config cannot be had."""
    if name == "hpsv3":
        return Qwen2VLModel(Qwen2VLConfig(text_config=QWEN2_7B, vision_config=QWEN2_VISION))
    if name == "videoreward":
        small = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
        vision = QWEN2_VISION | {"hidden_size": 1536}
        return Qwen2VLModel(Qwen2VLConfig(text_config=QWEN2_7B | small | {"vocab_size": 151660}, vision_config=vision))
    if name == "unifiedreward":
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
        text = QWEN2_7B | {"vocab_size": 152064}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    config = _config_of(name, files)
    return None if config is None else AutoModelForImageTextToText.from_config(config)


def _config_of(name: str, files: ModelFiles) -> Any:
    """Of the model in ``vlm:MODEL`` or ``ocr:MODEL``; None if it cannot be had, which the plan says."""
    try:
        folder = files.find(name, str(model_in(name)), "config.json").parent
    except RewardError:
        return None
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _asking(model: Any, given: Tensor, see: Callable[[Tensor], Tensor], words: int) -> int:
    """The most bytes while questions of so many words are answered, and differentiated where ``given`` is.

    The parts are called one by one: on the meta device the whole model would look at values.
    """
    text = model.language_model if hasattr(model, "language_model") else model.text_model
    with fused_attention(), LiveMemory() as memory:
        seen = see(given)
        asked = torch.zeros(len(seen), words, seen.shape[-1], device="meta", dtype=seen.dtype)
        tokens = torch.cat([seen, asked], 1)
        order = torch.arange(tokens.shape[1], device="meta").expand(len(seen), -1)
        places = order.expand(3, -1, -1) if hasattr(model, "visual") else order
        answers: Tensor = text(inputs_embeds=tokens, position_ids=places).last_hidden_state
        if given.requires_grad:
            torch.autograd.grad(answers, given, torch.zeros_like(answers))
    return memory.peak


def _qwen_patches(model: Any, batch_size: int, pixels: int, with_gradient: bool) -> Tensor:
    """Of a batch of images, as the processors of Qwen-VL cut them: (B * patches, values of a patch)."""
    config = model.visual.config
    each = 4 * round(pixels / config.patch_size**2 / 4)
    values = 3 * config.temporal_patch_size * config.patch_size**2
    dtype = model.language_model.dtype
    return torch.zeros(batch_size * each, values, device="meta", dtype=dtype, requires_grad=with_gradient)


def _qwen_sees(model: Any, batch_size: int, patches: Tensor) -> Tensor:
    """(B, tokens, features) of the image."""
    vision = model.visual
    states = vision.patch_embed(patches)
    places = torch.zeros(len(states), states.shape[-1] // vision.config.num_heads, device="meta")
    ends = len(patches) // batch_size * torch.arange(batch_size + 1)
    for block in vision.blocks:
        states = block(states, cu_seqlens=ends, position_embeddings=(places, places))
    merged: Tensor = vision.merger(states)
    return merged.unflatten(0, (batch_size, -1))


def _tiles(name: str, files: ModelFiles) -> int:
    """Into how many tiles the processors of SmolVLM and Idefics3 cut a square image, the whole one among them."""
    folder = files.find(name, str(model_in(name)), "preprocessor_config.json").parent
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    along = math.ceil(processor.size["longest_edge"] / processor.max_image_size["longest_edge"])
    return along**2 + 1 if processor.do_image_splitting and along > 1 else 1


def _smol_tiles(model: Any, batch_size: int, tiles: int, with_gradient: bool) -> Tensor:
    side, dtype = model.vision_model.config.image_size, model.text_model.dtype
    return torch.zeros(batch_size * tiles, 3, side, side, device="meta", dtype=dtype, requires_grad=with_gradient)


def _smol_sees(model: Any, batch_size: int, tiles: Tensor) -> Tensor:
    """(B, tokens, features) of the image's tiles."""
    vision = model.vision_model
    patches = vision.embeddings.patch_embedding(tiles).flatten(2).transpose(1, 2)
    states = vision.post_layernorm(vision.encoder(inputs_embeds=patches).last_hidden_state)
    merged: Tensor = model.connector(states)
    return merged.unflatten(0, (batch_size, -1)).flatten(1, 2)


def reward_names(spec: Any) -> list[str]:
    """The names in `reward_fn` or `heldout_reward_fn`, which may be none, one, several, or weighted."""
    return [spec] if isinstance(spec, str) else list(spec or ())


def _network(name: str) -> nn.Module | None:
    if name == "aesthetic":
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_L_14))
    if name == "aesthetic-v2.5":
        return SiglipVisionModel(SiglipVisionConfig(**SIGLIP_SO400M))
    if name == "subject-consistency":
        return ViTModel(ViTConfig(), add_pooling_layer=False)  # the defaults are ViT-B/16
    if name == "clipscore":
        return CLIPModel(CLIPConfig(text_config=TEXT_L, vision_config=VIT_L_14, projection_dim=768))
    if name in ("pickscore", "hpsv2"):
        return CLIPModel(CLIPConfig(text_config=TEXT_H, vision_config=VIT_H_14, projection_dim=1024))
    if name == "detector":
        both = nn.Module()
        both.boxes = Owlv2ForObjectDetection(Owlv2Config(vision_config={"image_size": 960, "patch_size": 16}))
        both.colors = CLIPModel(CLIPConfig(text_config=TEXT_L, vision_config=VIT_L_14, projection_dim=768))
        return both
    if name == "imagereward":
        vision = BlipVisionModel(BlipVisionConfig(**BLIP_VISION))
        vision.text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False)
        return vision
    return None
