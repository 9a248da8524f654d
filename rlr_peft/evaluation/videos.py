"""Videos as files, and as strips of frames for figures that show images."""

from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image
from torch import Tensor

FRAMES_OF_STRIP = 4


def as_images(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as they are; of videos (N, F, 3, H, W) up to four frames, first to last, side by side."""
    if images.ndim == 4:
        return images
    count = min(FRAMES_OF_STRIP, images.shape[1])
    chosen = torch.linspace(0, images.shape[1] - 1, count).round().long()
    return torch.cat(list(images[:, chosen].unbind(1)), dim=-1)


def save_video(path: Path, video: Tensor, fps: int) -> Path:
    """Writes a video as `.mp4` where imageio and its ffmpeg are installed, else as `.gif`.

    Args:
        path: of the file, without suffix; its folder is created.
        video: (F, 3, H, W) in [0, 1].
        fps: frames per second.

    Returns:
        The file's path.
    """
    pixels = (video.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    frames = [Image.fromarray(frame) for frame in pixels]
    path.parent.mkdir(parents=True, exist_ok=True)
    if find_spec("imageio") and find_spec("imageio_ffmpeg"):
        return Path(export_to_video(frames, str(path.with_suffix(".mp4")), fps=fps))
    return Path(export_to_gif(frames, str(path.with_suffix(".gif")), fps=fps))
