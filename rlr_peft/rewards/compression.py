"""Rewards on the size of the JPEG file: the classic rewards that cannot be differentiated."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

JPEG_QUALITY = 95
BYTES_PER_KILOBYTE = 1000  # kB, not KiB


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as a JPEG of quality 95.

    Args:
        images: (B, 3, H, W) in [0, 1]; rounded to 8 bits.

    Returns:
        (B,) float32, in kB of 1000 bytes, on the CPU.
    """
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(len(file.getvalue()) / BYTES_PER_KILOBYTE)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegReward:
    """Plus or minus the JPEG size in kB.

    Args:
        compressible: True rewards small files (`jpeg-compressibility`), False rewards large ones
            (`jpeg-incompressibility`).
    """

    differentiable = False

    def __init__(self, compressible: bool) -> None:
        self.name = "jpeg-compressibility" if compressible else "jpeg-incompressibility"
        self._sign = -1.0 if compressible else 1.0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) float32 on the images' device; prompts and metadata are not looked at."""
        return (self._sign * jpeg_kilobytes(images)).to(images.device)
