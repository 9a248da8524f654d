"""A small Stable Diffusion pipeline as one file under the keys of the original code."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

UNET = {
    r"time_embedding\.linear_1": "time_embed.0",
    r"time_embedding\.linear_2": "time_embed.2",
    r"conv_in": "input_blocks.0.0",
    r"conv_norm_out": "out.0",
    r"conv_out": "out.2",
    r"mid_block\.resnets\.0": "middle_block.0",
    r"mid_block\.attentions\.0": "middle_block.1",
    r"mid_block\.resnets\.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"conv_norm_out": "norm_out",
    r"down_blocks\.(\d)\.resnets\.(\d)": r"down.\1.block.\2",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"conv_shortcut": "nin_shortcut",
}


def save_as_single_file(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Writes UNet, VAE and text encoder as the original Stable Diffusion 1 lays them out."""
    unet, vae = pipeline.unet, pipeline.vae
    per_block = unet.config.layers_per_block + 1
    weights = {f"model.diffusion_model.{_of_unet(k, per_block)}": v for k, v in unet.state_dict().items()}
    weights |= {
        f"first_stage_model.{(key := _of_vae(k, len(vae.config.block_out_channels)))}": _as_convolution(key, v)
        for k, v in vae.state_dict().items()
    }
    weights |= {
        f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v
        for k, v in pipeline.text_encoder.state_dict().items()
    }
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, path)


def _of_unet(key: str, per_block: int) -> str:
    place = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", key)
    if place is None:
        return _replaced(key, UNET) if "attentions" in key else _layers(_replaced(key, UNET))
    way, block, kind, index, rest = place[1], int(place[2]), place[3], int(place[4]), place[5]
    if kind == "downsamplers":
        return f"input_blocks.{per_block * (block + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":  # the first block of the small UNet has attention before it
        return f"output_blocks.{per_block * (block + 1) - 1}.2.{rest}"
    number = per_block * block + index + (way == "down")
    side = "input" if way == "down" else "output"
    return f"{side}_blocks.{number}.{int(kind == 'attentions')}.{_layers(rest) if kind == 'resnets' else rest}"


def _of_vae(key: str, blocks: int) -> str:
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    return _replaced(key, VAE)


def _as_convolution(key: str, value: torch.Tensor) -> torch.Tensor:
    """The VAE's attention is of 1 x 1 convolutions there."""
    return value[..., None, None] if "mid.attn_1" in key and value.ndim == 2 else value


def _replaced(key: str, patterns: dict[str, str]) -> str:
    for pattern, replacement in patterns.items():
        key = re.sub(rf"(?<![^.]){pattern}(?=\.)", replacement, key)
    return key


def _layers(key: str) -> str:
    return ".".join(RESNET.get(word, word) for word in key.split("."))
