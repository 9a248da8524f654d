"""From images in [0, 1] to what reward models were trained on; torch only, batched and differentiable.

The published pipelines resize with PIL, which works on 8 bits, one direction after the other, and clamps in between. So
does `resize_like_pil`, without the rounding: it agrees with PIL to within that rounding, where a single bicubic call
without clamping differs by up to half of the range at sharp edges.
"""

from __future__ import annotations

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rlr_peft.prompt import ConditionImage

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """As CLIPImageProcessor: shortest side to `size`, bicubic, centre crop, CLIP's mean and standard deviation.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: height and width of the result, in pixels.

    Returns:
        (B, 3, size, size) float32.
    """
    height, width = _shortest_side_to(images, size)
    resized = resize_like_pil(images, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return normalize(resized[..., top : top + size, left : left + size], CLIP_MEAN, CLIP_STD)


def padded_clip_pixels(images: Tensor, size: int) -> Tensor:
    """As HPSv2: longest side to `size`, bicubic on floats without clamping, black borders, CLIP's mean and deviation.

    Args, returns: as `clip_pixels`.
    """
    scale = size / max(images.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
    resized = resize(images.float(), height, width)
    top, left = (size - height) // 2, (size - width) // 2
    padded = F.pad(resized, (left, size - width - left, top, size - height - top))
    return normalize(padded, CLIP_MEAN, CLIP_STD)


def squared_pixels(images: Tensor, size: int) -> Tensor:
    """As SiglipImageProcessor: both sides to `size`, whatever the shape, bicubic, to [-1, 1].

    Args, returns: as `clip_pixels`.
    """
    return 2 * resize_like_pil(images, size, size) - 1


def imagenet_pixels(images: Tensor, size: int, multiple_of: int) -> Tensor:
    """For DINO: shortest side to `size`, bicubic, ImageNet's mean and deviation; nothing but odd borders is cut off.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: of the shortest side, in pixels; a multiple of `multiple_of`.
        multiple_of: side of a patch; the longest side is cropped to whole patches, at its centre.

    Returns:
        (B, 3, h, w) float32.
    """
    height, width = _shortest_side_to(images, size)
    resized = resize_like_pil(images, height, width)
    cropped_height, cropped_width = (side - side % multiple_of for side in (height, width))
    top, left = (height - cropped_height) // 2, (width - cropped_width) // 2
    cropped = resized[..., top : top + cropped_height, left : left + cropped_width]
    return normalize(cropped, IMAGENET_MEAN, IMAGENET_STD)


def vbench_pixels(frames: Tensor, size: int) -> Tensor:
    """As VBench's for DINO: shortest side to `size`, bilinear without antialiasing, ImageNet's mean and deviation.

    VBench rounds the resized frames to 8 bits, which has no gradient and is left out.

    Args:
        frames: (B, 3, H, W) in [0, 1].
        size: of the shortest side, in pixels.

    Returns:
        (B, 3, h, w) float32; nothing is cut off.
    """
    resized = resize(frames.float(), *_shortest_side_to(frames, size), mode="bilinear", antialias=False)
    return normalize(resized, IMAGENET_MEAN, IMAGENET_STD)


def resize_like_pil(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """With antialiasing, first in width, then in height, clamped to [0, 1] after each, in float32.

    So did Pillow until version 13, with which the models were trained; that takes the height first if it shrinks more.

    Args:
        images: (B, 3, H, W).
        height, width: of the result, in pixels.
        mode: `bilinear`, `bicubic` or `lanczos`.
    """
    resized = images.float()
    if width != images.shape[-1]:
        resized = resize(resized, images.shape[-2], width, mode).clamp(0, 1)
    if height != images.shape[-2]:
        resized = resize(resized, height, width, mode).clamp(0, 1)
    return resized


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic", antialias: bool = True) -> Tensor:
    """torch's `interpolate`, as matrix products: on a GPU, its own backward pass adds in random order.

    Args:
        images: (B, 3, H, W).
        height, width: of the result, in pixels.
        mode, antialias: as `interpolate`'s; or `lanczos`, which it has not, always with antialiasing.

    Returns:
        (B, 3, height, width), equal to `interpolate`'s result up to rounding.
    """
    resized = images
    if width != images.shape[-1]:
        resized = resized @ _resizing(images, images.shape[-1], width, mode, antialias)
    if height != images.shape[-2]:
        resized = _resizing(images, images.shape[-2], height, mode, antialias).T @ resized
    return resized


def _resizing(like: Tensor, length: int, size: int, mode: str, antialias: bool) -> Tensor:
    """What every one of `length` pixels gives to every one of `size`."""
    if mode == "lanczos":
        return _lanczos(length, size).to(like)
    rows = torch.eye(length, device=like.device, dtype=like.dtype)[None, None]
    return F.interpolate(rows, size=(length, size), mode=mode, antialias=antialias)[0, 0]


def _lanczos(length: int, size: int) -> Tensor:
    """PIL's Lanczos window of three lobes, (length, size) float64: widened where pixels become fewer."""
    scale = length / size
    widened = max(scale, 1.0)
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    distances = (torch.arange(length, dtype=torch.float64)[:, None] + 0.5 - centres) / widened
    weights = torch.where(distances.abs() < 3, torch.sinc(distances) * torch.sinc(distances / 3), 0.0)
    return weights / weights.sum(0)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(images - mean) / std``, channel by channel."""
    channels = torch.tensor([mean, std], device=images.device, dtype=images.dtype)[:, :, None, None]
    return (images - channels[0]) / channels[1]


def condition_pixels(image: ConditionImage, width: int, height: int) -> Tensor:
    """The picture that a sample is drawn from, at the sample's size, (3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(numpy.array(image.fitted(width, height))).movedim(-1, 0) / 255


def to_8_bit(images: Tensor) -> NDArray[numpy.uint8]:
    """(..., H, W, 3), as an image file holds images (..., 3, H, W) in [0, 1]; they are clamped there."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()


def _shortest_side_to(images: Tensor, size: int) -> tuple[int, int]:
    """Height and width that keep the shape; the longest side is rounded down, as transformers and torchvision do."""
    height, width = images.shape[-2:]
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size
