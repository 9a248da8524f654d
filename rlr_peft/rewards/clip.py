"""CLIP models of `transformers`: loading, tokenizing, and the cosine of image and text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from rlr_peft.rewards.model_files import ModelFiles
from rlr_peft.rewards.model_reward import loading

OPENAI_CLIP = "openai/clip-vit-large-patch14"
LAION_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MODEL_FILES = ("config.json", ("model.safetensors", "pytorch_model.bin"))
TOKENIZER_FILES = ("vocab.json", "merges.txt")


def load_clip(reward_name: str, files: ModelFiles, repo: str, dtype: torch.dtype) -> CLIPModel:
    """Both towers."""
    folder = files.folder(reward_name, repo, *MODEL_FILES)
    with loading(reward_name, folder):
        return CLIPModel.from_pretrained(folder, dtype=dtype)


def load_clip_vision(
    reward_name: str, files: ModelFiles, repo: str, dtype: torch.dtype
) -> CLIPVisionModelWithProjection:
    """The image tower and its projection."""
    folder = files.folder(reward_name, repo, *MODEL_FILES)
    with loading(reward_name, folder):
        return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=dtype)


def load_clip_tokenizer(reward_name: str, files: ModelFiles, repo: str) -> CLIPTokenizer:
    """From `vocab.json` and `merges.txt`."""
    folder = files.folder(reward_name, repo, *TOKENIZER_FILES)
    with loading(reward_name, folder):
        return CLIPTokenizer.from_pretrained(folder)


def clip_cosine(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, prompts: list[str]) -> Tensor:
    """Cosine of the features of every image and its prompt.

    Args:
        model: any dtype.
        tokenizer: of the model.
        pixels: (B, 3, size, size), preprocessed.
        prompts: B prompts; what is beyond the model's text length is cut off.

    Returns:
        (B,) float32 in [-1, 1].
    """
    # What follows the end of the text has no influence on it in a causal text model, so no mask is needed.
    ids = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).input_ids.to(pixels.device)
    with torch.no_grad():
        text = unit(model.get_text_features(input_ids=ids).pooler_output)
    return (unit(clip_image_features(model, pixels)) * text).sum(-1)


def clip_image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """(B, D) projected image embeddings, not normalised, of preprocessed pixels (B, 3, size, size)."""
    embeddings: Tensor = model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output
    return embeddings


def unit(features: Tensor) -> Tensor:
    """Features (B, D) of length 1, in float32."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)
