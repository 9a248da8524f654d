"""Random-weight pipelines, as small as their classes allow: real diffusers classes, real block types, no download."""

from dataclasses import fields
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rlr_peft.chain import DenoisingChain
from rlr_peft.config import ChainArguments

PROMPT_LENGTH = 16
"""Tokens in an encoded prompt, start and end included."""
WIDTH = 16
"""Features of every token."""


def letter_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the printable ASCII characters; made in memory."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=PROMPT_LENGTH)


def clip_text_model(
    projection: bool = False, width: int = WIDTH, layers: int = 2
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text tower; with ``projection`` the class that SDXL and SD3 use."""
    tokenizer = letter_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def image_vae(latent_channels: int, sample_size: int = 16, **arguments: Any) -> AutoencoderKL:
    """An ``AutoencoderKL`` that halves height and width."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=sample_size,
        **arguments,
    )


def tiny_stable_diffusion(
    prediction_type: str = "epsilon",
    *,
    seed: int = 0,
    sample_size: int = 8,
    timestep_spacing: str = "leading",
    dtype: torch.dtype = torch.float32,
) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` with SD's block types, 4 latent channels and a factor-2 VAE; eval mode, on the CPU.

    Args:
        prediction_type: what the UNet predicts: `epsilon`, `v_prediction` or `sample`.
        seed: of the random weights; the same seed gives the same weights, and the global RNG state is left as it was.
        sample_size: side of the latents; images are `2 * sample_size` pixels wide.
        timestep_spacing: the DDIM grid: `leading`, `trailing` or `linspace`.
        dtype: of all weights.

    `save_pretrained(folder)` and `StableDiffusionPipeline.from_pretrained(folder)` give the same pipeline back, so the
    folder serves as a model id in tests.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        text_encoder = clip_text_model(width=8, layers=1)
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=8,
            norm_num_groups=4,
        )
        vae = image_vae(4, 2 * sample_size)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=letter_tokenizer(),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if dtype == torch.float32 else pipeline.to(dtype=dtype)


def chain_over(pipeline: Any, **options: Any) -> DenoisingChain:
    """A chain; the options are knobs of the config's chain, or arguments of ``DenoisingChain`` itself."""
    names = [field.name for field in fields(ChainArguments) if field.name in options]
    return DenoisingChain(pipeline, ChainArguments(**{name: options.pop(name) for name in names}), **options)
