"""Bases and a reward with random weights and real sizes, in the files in which the Hub has them.

Random weights cost what trained ones cost. A model at a time is in memory.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection, T5Tokenizer

from rlr_peft.plan import BlankTokenizer, build_pipeline, find_architecture

T5_WORDS = 32_000  # besides the 100 that T5 keeps for its own training
AESTHETIC_WIDTHS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def base_folder(name: str, folder: Path) -> Path:
    """Where `save_base` puts the base of this Hub id."""
    return folder / name.replace("/", "--")


def save_base(name: str, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Saves a pipeline of a shipped architecture, if it is not there yet: sharded weights, tokenizers of true size."""
    target = base_folder(name, folder)
    if (target / "model_index.json").exists():
        return
    architecture = find_architecture(name)
    pipeline: Any = build_pipeline(architecture, torch.device("meta"), dtype)
    for part, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            fill(component)
        elif isinstance(component, BlankTokenizer):
            is_t5 = architecture.model_index[part][1].startswith("T5")
            setattr(pipeline, part, (_t5_tokenizer if is_t5 else _clip_tokenizer)(component.model_max_length))
        if getattr(pipeline, part) is not None:
            getattr(pipeline, part).save_pretrained(target / part)
        if isinstance(component, nn.Module):
            component.to_empty(device="meta")
    pipeline.save_config(target)  # last: it says that the rest is there


def fill(model: nn.Module) -> None:
    """Gives a model of the meta device random weights, on the CPU or the GPU where there is one."""
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]  # of torch's own layers
            continue
        for parameter in module.parameters(recurse=False):
            with torch.no_grad():
                parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, 0.02)


def reward_files(folder: Path) -> dict[str, str]:
    """The aesthetic reward's places, for `--reward_model_path`."""
    return {
        "openai/clip-vit-large-patch14": str(folder / "clip"),
        "trl-lib/ddpo-aesthetic-predictor": str(folder),
    }


def save_reward(folder: Path) -> None:
    """Saves the aesthetic predictor and its CLIP ViT-L/14, if they are not there yet."""
    if (folder / "clip").exists():
        return
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "clip")
    layers = {number: nn.Linear(*width) for number, width in AESTHETIC_WIDTHS.items()}
    head = {f"layers.{n}.{key}": value for n, layer in layers.items() for key, value in layer.state_dict().items()}
    save_file(head, folder / "aesthetic-model.safetensors")


def _clip_tokenizer(model_max_length: int) -> CLIPTokenizer:
    """CLIP's vocabulary by size: its 256 bytes, alone and at the end of a word, and names for the rest; no merges."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"<{i}>" for i in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=model_max_length)


def _t5_tokenizer(model_max_length: int) -> T5Tokenizer:
    """T5's vocabulary by size: letters and the space, and names for the rest."""
    letters = ["\u2581", *(chr(number) for number in range(33, 127))]
    words = ["<pad>", "</s>", "<unk>", *letters]
    words += [f"word{i}" for i in range(T5_WORDS - len(words))]
    return T5Tokenizer(vocab=[(word, -float(i)) for i, word in enumerate(words)], model_max_length=model_max_length)
