"""Images as a page holds them: small files, as text inside the page."""

import base64
import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from rlr_peft.figures import FRAMES_OF_STRIP, as_images

# Images up to this side are shown pixel by pixel; WebP would smear their edges.
SMALL_SIDE = 128  # pixels
LARGEST_SIDE = 512  # pixels, of an image or of one frame of a strip
QUALITY = 85  # of WebP, in percent


@dataclass(frozen=True)
class Picture:
    """One image, or of a video a strip of frames, as a file.

    Attributes:
        data: the file.
        mime_type: its kind.
        width: in pixels.
        height: in pixels.
        num_frames: frames side by side; 1 for an image.
    """

    data: bytes
    mime_type: str
    width: int
    height: int
    num_frames: int = 1

    @property
    def data_uri(self) -> str:
        """The file as a page's `src`."""
        return f"data:{self.mime_type};base64,{base64.b64encode(self.data).decode('ascii')}"


def make_pictures(images: Tensor) -> list[Picture]:
    """Pictures of images (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1]; no side of a frame is over 512 pixels."""
    num_frames = 1 if images.ndim == 4 else min(FRAMES_OF_STRIP, images.shape[1])
    return [_picture(image, num_frames) for image in as_images(images).detach().float().cpu()]


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of images in [0, 1], rounded as an image file holds them, on the CPU."""
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def as_pil(image: Tensor) -> Image.Image:
    """One (3, H, W) uint8 image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _picture(image: Tensor, num_frames: int) -> Picture:
    picture = as_pil(to_bytes(image))
    width, height = picture.width // num_frames, picture.height
    scale = min(1.0, LARGEST_SIDE / max(width, height))
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(width, height) <= SMALL_SIDE:
        picture.save(buffer, format="PNG", optimize=True)
        return Picture(buffer.getvalue(), "image/png", picture.width, picture.height, num_frames)
    picture.save(buffer, format="WEBP", quality=QUALITY)
    return Picture(buffer.getvalue(), "image/webp", picture.width, picture.height, num_frames)
