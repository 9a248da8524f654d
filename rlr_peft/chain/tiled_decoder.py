"""A VAE that decodes in tiles, which the backward pass recomputes one at a time: its tape is that of a single tile."""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class _Recomputed(nn.Module):
    """A decoder that keeps nothing but its input for the backward pass."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of a tile."""
        decoded: torch.Tensor = checkpoint(self.decoder, latents, use_reentrant=False, preserve_rng_state=False)
        return decoded


def in_tiles(vae: Any, pixels: int) -> Any:
    """A decoder over the same weights, which decodes squares of so many pixels and blends them where they overlap.

    Normalisation and attention see a tile in place of the image, so that its images are not quite the VAE's.

    Args:
        vae: an AutoencoderKL; left as it is.

    Raises:
        ValueError: another class, or tiles smaller than four latents.
    """
    if type(vae).__name__ != "AutoencoderKL":
        raise ValueError(
            f"vae_tile_size: expected a pipeline with an AutoencoderKL, got {type(vae).__name__}; leave "
            "--vae_tile_size out."
        )
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    if pixels % (4 * scale):
        raise ValueError(
            f"vae_tile_size: expected a multiple of {4 * scale} pixels, of whose latents a quarter overlaps, got "
            f"{pixels}; round it."
        )
    tiled = copy.copy(vae)
    tiled.__dict__["_modules"] = {**vae._modules, "decoder": _Recomputed(vae.decoder)}
    tiled.enable_tiling()
    tiled.tile_sample_min_size, tiled.tile_latent_min_size = pixels, pixels // scale
    return tiled
