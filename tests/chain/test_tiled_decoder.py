"""A decode in tiles: diffusers' own tiled images, their gradient, and the tape of a single tile."""

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor
from torch.testing import assert_close

from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain import in_tiles

TILE = 32


def small_vae() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )
    return vae.double().requires_grad_(False).eval()


def latents(side: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, side, side, generator=generator, dtype=torch.float64).requires_grad_()


def test_images_and_gradient_are_those_of_diffusers_tiles() -> None:
    vae, x = small_vae(), latents(24)
    expected = copy.deepcopy(vae)
    expected.enable_tiling()
    expected.tile_sample_min_size, expected.tile_latent_min_size = TILE, TILE // 4
    images, others = (decoder.decode(x).sample for decoder in (in_tiles(vae, TILE), expected))
    assert images.shape[-1] == 96 and torch.equal(images, others)
    gradients = [torch.autograd.grad(made.square().mean(), x)[0] for made in (images, others)]
    assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_the_gradient_is_the_derivative() -> None:
    tiled, x = in_tiles(small_vae(), TILE), latents(24)
    direction, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1e-5
    (gradient,) = torch.autograd.grad(tiled.decode(x).sample.square().mean(), x)
    with torch.no_grad():
        above, below = (tiled.decode(x + sign * step * direction).sample.square().mean() for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float((above - below) / (2 * step)), rel=1e-6)


def test_the_tape_hardly_grows_with_the_image() -> None:
    vae = small_vae()
    tiled, x = in_tiles(vae, TILE), latents(36)
    held = {}
    for name, decoder in (("whole", vae), ("tiles", tiled)):
        with counted_tape() as tape:
            images = decoder.decode(x).sample
            held[name] = tape.live
            torch.autograd.grad(images.sum(), x)
        held[f"{name} at the peak"] = tape.peak
    assert held["tiles"] < held["whole"] / 10
    with counted_tape() as tape:
        vae.decode(latents(TILE // 4)).sample.sum().backward()
    assert held["tiles at the peak"] < held["tiles"] + 1.5 * tape.peak < held["whole at the peak"] / 3


def test_small_images_are_decoded_as_ever_and_the_vae_is_left_alone() -> None:
    vae, x = small_vae(), latents(8)
    before = vae.decode(latents(24)).sample
    assert torch.equal(in_tiles(vae, TILE).decode(x).sample, vae.decode(x).sample)
    assert not vae.use_tiling and torch.equal(vae.decode(latents(24)).sample, before)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match="expected a multiple of 16 pixels, of whose latents a quarter overlaps, got 40"
    ):
        in_tiles(small_vae(), 40)
    with torch.device("meta"):
        video = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1)
    with pytest.raises(ValueError, match="expected a pipeline with an AutoencoderKL, got AutoencoderKLWan; leave"):
        in_tiles(video, TILE)
