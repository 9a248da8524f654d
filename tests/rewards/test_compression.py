"""JPEG sizes against PIL itself."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlr_peft.errors import RewardError
from rlr_peft.rewards import load_reward, score_images

PROMPTS = ["flat", "noise"]


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.full((3, 32, 48), 0.3), torch.rand(3, 32, 48, generator=generator)])


def kilobytes(image: torch.Tensor, path: Path) -> float:
    """Size on disk of the image as Pillow saves it."""
    width, height = image.shape[2], image.shape[1]
    picture = Image.new("RGB", (width, height))
    for y in range(height):
        for x in range(width):
            picture.putpixel((x, y), tuple(round(float(value) * 255) for value in image[:, y, x]))
    picture.save(path, quality=95)
    return path.stat().st_size / 1000


def test_scores_are_the_sizes_of_the_files(images: torch.Tensor, tmp_path: Path) -> None:
    expected = torch.tensor([kilobytes(image, tmp_path / "image.jpg") for image in images])
    compressibility = score_images(load_reward("jpeg-compressibility"), images, PROMPTS)
    incompressibility = score_images(load_reward("jpeg-incompressibility"), images, PROMPTS)
    assert torch.allclose(compressibility, -expected)
    assert torch.allclose(incompressibility, expected)
    assert compressibility[0] > compressibility[1]


def test_there_is_no_gradient_and_none_is_claimed(images: torch.Tensor) -> None:
    reward = load_reward("jpeg-compressibility")
    assert reward.differentiable is False
    assert not score_images(reward, images.requires_grad_(), PROMPTS).requires_grad


def test_half_precision_images_are_rounded_to_the_nearest_of_256_values(images: torch.Tensor) -> None:
    eight_bit = (images * 255).round() / 255
    reward = load_reward("jpeg-incompressibility")
    assert torch.equal(score_images(reward, eight_bit.half(), PROMPTS), score_images(reward, eight_bit, PROMPTS))


def test_quality_is_95(images: torch.Tensor) -> None:
    buffer = io.BytesIO()
    pixels = (images[1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    assert score_images(load_reward("jpeg-incompressibility"), images, PROMPTS)[1] > len(buffer.getvalue()) / 1000


def test_images_too_long_for_a_jpeg_are_refused_in_words() -> None:
    reward = load_reward("jpeg-compressibility")
    with pytest.raises(RewardError, match="at most 65500 pixels a side, got 65501 x 1"):
        score_images(reward, torch.zeros(1, 3, 1, 65_501), ["line"])
    assert torch.isfinite(score_images(reward, torch.zeros(1, 3, 1, 65_500), ["line"])).all()
