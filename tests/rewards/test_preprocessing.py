"""Preprocessing in torch against PIL's."""

import pytest
import torch
from transformers import CLIPImageProcessorPil

from benchmarks.reward_parity import mixed_images, published_hps_pixels, to_tensor
from rlr_peft.rewards import (
    CLIP_MEAN,
    CLIP_STD,
    clip_pixels,
    imagenet_pixels,
    padded_clip_pixels,
    resize,
    resize_like_pil,
)

SHAPES = [(224, 224), (512, 512), (300, 500), (500, 300), (97, 180), (225, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clip_pixels_are_those_of_the_published_processor(shape: tuple[int, int]) -> None:
    images = mixed_images(shape, 2)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    expected = processor(images=images, return_tensors="pt").pixel_values
    got = clip_pixels(to_tensor(images), 224)
    assert got.shape == expected.shape and got.dtype == torch.float32
    difference = (got - expected).abs()
    # PIL rounds to 8 bits after each direction; one step is 1 / 255 / .26 = .015.
    assert difference.max() < 0.02 and difference.mean() < 0.006


def test_without_clamping_in_between_the_same_comparison_would_fail() -> None:
    images = mixed_images((300, 500), 2)
    single = torch.nn.functional.interpolate(to_tensor(images), size=(224, 373), mode="bicubic", antialias=True)
    assert (single - resize_like_pil(to_tensor(images), 224, 373)).abs().max() > 0.02


@pytest.mark.parametrize(("mode", "antialias"), [("bicubic", True), ("bilinear", False)])
@pytest.mark.parametrize("size", [(7, 5), (31, 64), (20, 50)])
def test_matrix_products_resize_as_torch_does(size: tuple[int, int], mode: str, antialias: bool) -> None:
    images = torch.rand(2, 3, 20, 33, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.interpolate(images, size=size, mode=mode, antialias=antialias)
    got = resize(images, *size, mode, antialias)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hpsv2_pixels_are_those_of_a_float_resize_on_black(shape: tuple[int, int]) -> None:
    images = mixed_images(shape, 2)
    got = padded_clip_pixels(to_tensor(images), 224)
    assert got.shape == (2, 3, 224, 224)
    assert (got - published_hps_pixels(images, 224)).abs().max() < 1e-3


def test_hpsv2_borders_are_black() -> None:
    pixels = padded_clip_pixels(torch.ones(1, 3, 50, 100), 32)
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    assert torch.allclose(pixels[0, :, 0, 0], black) and torch.allclose(pixels[0, :, -1, -1], black)
    assert not torch.allclose(pixels[0, :, 16, 16], black)


def test_dino_pixels_keep_the_shape_up_to_whole_patches() -> None:
    assert imagenet_pixels(torch.rand(2, 3, 60, 100), 32, 8).shape == (2, 3, 32, 48)
    assert imagenet_pixels(torch.rand(2, 3, 100, 60), 32, 8).shape == (2, 3, 48, 32)


@pytest.mark.parametrize("preprocess", [clip_pixels, padded_clip_pixels])
def test_gradients_match_finite_differences(preprocess) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    image = 0.4 + 0.2 * torch.rand(1, 3, 11, 9, generator=generator)  # off the clamps, where there is no derivative
    weight = torch.randn(1, 3, 6, 6, generator=generator)
    image.requires_grad_(True)
    (gradient,) = torch.autograd.grad((preprocess(image, 6) * weight).sum(), image)
    direction = torch.randn(image.shape, generator=generator)
    with torch.no_grad():
        step = 0.01  # resizing is linear off the clamps, so a large step costs no exactness
        ahead, behind = ((preprocess(image + sign * step * direction, 6) * weight).sum() for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind).item() / (2 * step), rel=1e-3)


def test_bfloat16_images_are_resized_in_float32() -> None:
    images = torch.rand(1, 3, 40, 40)
    assert clip_pixels(images.bfloat16(), 32).dtype == torch.float32
