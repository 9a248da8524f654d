"""Random weights in the real files of reward models: what `hf download` would bring, but small (or of full size)."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging as transformers_logging

from benchmarks.reward_references import OpenClip
from benchmarks.reward_references_bert import ReferenceImageReward

LETTERS = [chr(code) for code in range(33, 127)]


@dataclass(frozen=True)
class Sizes:
    """Of all networks; the defaults are tiny, with the real kinds of layers."""

    image: int = 32
    patch: int = 8
    depth: int = 2
    text_depth: int = 2
    vision_width: int = 64
    text_width: int = 32
    projection: int = 32
    vocabulary: int | None = None


def write_clip_tokenizer(folder: Path) -> int:
    """`vocab.json` and `merges.txt` of single letters; returns the vocabulary's size."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return len(tokens)


def write_clip(folder: Path, sizes: Sizes, act: str = "quick_gelu", eos_token_id: int | None = None) -> CLIPModel:
    """A CLIPModel with its tokenizer, as openai's and PickScore's repositories hold it."""
    vocabulary = write_clip_tokenizer(folder)
    text = {"vocab_size": vocabulary, "max_position_embeddings": 77, "hidden_size": sizes.text_width, "hidden_act": act}
    text |= {"intermediate_size": 4 * sizes.text_width, "num_attention_heads": 4, "num_hidden_layers": sizes.text_depth}
    # openai's own config says 2, which means "the token with the largest number".
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": eos_token_id or vocabulary - 1}
    vision: dict[str, Any] = {"hidden_size": sizes.vision_width, "intermediate_size": 4 * sizes.vision_width}
    vision |= {"num_attention_heads": 4, "num_hidden_layers": sizes.depth, "hidden_act": act}
    vision |= {"image_size": sizes.image, "patch_size": sizes.patch, "projection_dim": sizes.projection}
    text |= {"projection_dim": sizes.projection}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.projection)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    _save(model, folder)
    return model


def write_aesthetic_head(folder: Path, width: int) -> dict[str, torch.Tensor]:
    """`aesthetic-model.pth` as the DDPO predictor's repository holds it; returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    widths = [width, 1024, 128, 64, 16, 1]
    weights = {}
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        weights[f"layers.{number}.weight"] = torch.randn(outputs, inputs) * inputs**-0.5
        weights[f"layers.{number}.bias"] = torch.randn(outputs) * 0.1
    torch.save(weights, folder / "aesthetic-model.pth")
    return weights


def write_siglip(folder: Path, head: Path, sizes: Sizes) -> tuple[SiglipModel, dict[str, torch.Tensor]]:
    """A SiglipModel, and the head of Aesthetic Predictor V2.5 with its weights as its authors name them."""
    vision: dict[str, Any] = {"hidden_size": sizes.vision_width, "intermediate_size": 4 * sizes.vision_width}
    vision |= {"num_attention_heads": 4, "num_hidden_layers": sizes.depth, "image_size": sizes.image}
    text: dict[str, Any] = {"hidden_size": sizes.vision_width, "intermediate_size": 64, "num_attention_heads": 4}
    text |= {"num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision | {"patch_size": sizes.patch})).eval()
    _save(model, folder)
    widths = [sizes.vision_width, 1024, 128, 64, 16, 1]
    weights = {}
    for number, inputs, outputs in zip((0, 2, 4, 6, 8), widths, widths[1:], strict=False):
        weights[f"scoring_head.{number}.weight"] = torch.randn(outputs, inputs) * inputs**-0.5
        weights[f"scoring_head.{number}.bias"] = torch.randn(outputs) * 0.1
    torch.save(OrderedDict(weights), head)
    return model, weights


def write_hpsv2(folder: Path, sizes: Sizes, file: str = "HPS_v2.1_compressed.pt") -> OpenClip:
    """An open_clip checkpoint as HPSv2's repository holds it; heads are 16 in both towers, as there."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = 2 * len(LETTERS) + 2
    model = OpenClip(
        sizes.vocabulary or vocabulary,
        size=sizes.image,
        patch=sizes.patch,
        vision_width=sizes.vision_width,
        text_width=sizes.text_width,
        depth=(sizes.depth, sizes.text_depth),
        projection=sizes.projection,
    ).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / file)
    return model


def write_image_reward(folder: Path, bert: Path, sizes: Sizes) -> ReferenceImageReward:
    """`ImageReward.pt`, and BERT's `vocab.txt` of single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    bert.mkdir(parents=True, exist_ok=True)
    letters = [letter for letter in LETTERS if letter == letter.lower()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (bert / "vocab.txt").write_text("\n".join(tokens) + "\n")
    model = ReferenceImageReward(
        len(tokens),
        size=sizes.image,
        patch=sizes.patch,
        vision_width=max(64, sizes.vision_width),
        text_width=max(64, sizes.text_width),
        depth=(sizes.depth, sizes.text_depth),
    ).eval()
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return model


def write_dino(folder: Path, sizes: Sizes) -> ViTModel:
    """A ViTModel as facebook/dino-vitb16 holds it."""
    config = ViTConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=4,
        image_size=sizes.image,
        patch_size=sizes.patch,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    _save(model, folder)
    return model


def write_owl(folder: Path) -> None:
    """An OWLv2 with tokenizer and image processor."""
    vocabulary = write_clip_tokenizer(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Owlv2Config(
        text_config=small | {"vocab_size": vocabulary, "max_position_embeddings": 64},
        vision_config=small | {"image_size": 64, "patch_size": 8},
        projection_dim=32,
    )
    model = Owlv2ForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")


def _save(model: Any, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
