"""Small pipelines as one file under the keys of the original code: Stable Diffusion 1, SDXL, FLUX."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

UNET = {
    r"time_embedding\.linear_1": "time_embed.0",
    r"time_embedding\.linear_2": "time_embed.2",
    r"conv_in": "input_blocks.0.0",
    r"conv_norm_out": "out.0",
    r"conv_out": "out.2",
    r"mid_block\.resnets\.0": "middle_block.0",
    r"mid_block\.attentions\.0": "middle_block.1",
    r"mid_block\.resnets\.1": "middle_block.2",
    r"add_embedding\.linear_1": "label_emb.0.0",
    r"add_embedding\.linear_2": "label_emb.0.2",
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


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_BLOCKS = {
    "transformer_blocks": {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_q attn.to_k attn.to_v": "img_attn.qkv",
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "txt_attn.qkv",
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    },
    "single_transformer_blocks": {
        "norm.linear": "modulation.lin",
        "attn.to_q attn.to_k attn.to_v proj_mlp": "linear1",
        "attn.norm_q": "norm.query_norm",
        "attn.norm_k": "norm.key_norm",
        "proj_out": "linear2",
    },
}


def save_as_single_file(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Writes UNet, VAE and text encoder as the original Stable Diffusion 1 lays them out."""
    weights = _unet_and_vae(pipeline)
    weights |= _named_under("cond_stage_model.transformer.text_model.", _text_model(pipeline.text_encoder))
    _save(weights, path)


def save_as_sdxl_file(pipeline: StableDiffusionXLPipeline, path: Path) -> None:
    """The same for SDXL, whose second text encoder is OpenCLIP's."""
    weights = _unet_and_vae(pipeline)
    weights |= _named_under("conditioner.embedders.0.transformer.text_model.", _text_model(pipeline.text_encoder))
    weights |= _named_under("conditioner.embedders.1.model.", _as_open_clip(pipeline.text_encoder_2))
    _save(weights, path)


def save_as_flux_file(pipeline: FluxPipeline, path: Path) -> None:
    """FLUX's transformer and VAE, as files with both have them."""
    transformer = _named_under("model.diffusion_model.", _as_flux(pipeline.transformer.state_dict()))
    _save({**transformer, **_vae(pipeline.vae, "vae.")}, path)


def _unet_and_vae(pipeline: Any) -> dict[str, Tensor]:
    per_block = pipeline.unet.config.layers_per_block + 1
    weights = {
        f"model.diffusion_model.{_of_unet(key, per_block)}": value for key, value in pipeline.unet.state_dict().items()
    }
    return weights | _vae(pipeline.vae, "first_stage_model.")


def _vae(vae: Any, prefix: str) -> dict[str, Tensor]:
    blocks = len(vae.config.block_out_channels)
    named = {_of_vae(key, blocks): value for key, value in vae.state_dict().items()}
    return {f"{prefix}{key}": _as_convolution(key, value) for key, value in named.items()}


def _text_model(encoder: nn.Module) -> dict[str, Tensor]:
    return {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}


def _as_open_clip(encoder: nn.Module) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix there, and the projection is transposed."""
    weights = _text_model(encoder)
    found = {"text_projection": weights.pop("text_projection.weight").T}
    for key, value in weights.items():
        if "self_attn.q_proj" in key:
            joined = torch.cat([weights[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            key, value = key.replace("self_attn.q_proj.", "attn.in_proj_"), joined
        elif "k_proj" in key or "v_proj" in key:
            continue
        for ours, theirs in OPEN_CLIP.items():
            key = key.replace(ours, theirs)
        found[key] = value
    return found


def _as_flux(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some layers are one matrix there, norms have scales, and the last layer's shift comes before its scale."""
    found = {}
    for ours, theirs in _flux_layers(weights).items():
        for kind in ("weight", "bias"):
            parts = [weights[f"{name}.{kind}"] for name in ours.split() if f"{name}.{kind}" in weights]
            if theirs.startswith("final_layer.adaLN"):
                parts = [half for part in parts for half in reversed(part.chunk(2))]
            if parts:
                joined = torch.cat(parts) if len(parts) > 1 else parts[0]
                found[f"{theirs}.{'scale' if theirs.endswith('_norm') else kind}"] = joined
    return found


def _flux_layers(weights: dict[str, Tensor]) -> dict[str, str]:
    """Layers of diffusers, those that are joined with blanks between them, and what the original code calls them."""
    layers = dict(FLUX)
    for kind, names in FLUX_BLOCKS.items():
        theirs = "double_blocks" if kind == "transformer_blocks" else "single_blocks"
        for number in {key.split(".")[1] for key in weights if key.startswith(f"{kind}.")}:
            for ours, name in names.items():
                joined = " ".join(f"{kind}.{number}.{part}" for part in ours.split())
                layers[joined] = f"{theirs}.{number}.{name}"
    return layers


def _named_under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def _save(weights: dict[str, Tensor], path: Path) -> None:
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
