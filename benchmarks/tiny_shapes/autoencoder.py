"""The autoencoder: 64x64 images to 16x16 latents of 4 channels and back."""

import itertools
import multiprocessing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL

from benchmarks.tiny_shapes.dataset import as_images
from benchmarks.tiny_shapes.loop import LoopSettings, load_averaged_weights, train
from rlr_peft.tiny_shapes import IMAGE_SIZE

_CROP_SHARE = 0.6
_KL_WEIGHT = 1e-4
_GRADIENT_WEIGHT = 0.5
_ENCODE_BATCH = 16


def create_vae() -> AutoencoderKL:
    """An untrained autoencoder with about 0.65 million parameters."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )
    # Start with little posterior noise (variance e^-6), otherwise the decoder first learns to ignore the latents.
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
    return vae


def train_vae(drawings_path: Path, folder: Path, settings: LoopSettings, batch_size: int) -> bool:
    """Train on the drawings; returns whether all steps are done.

    The first part of the training sees 32-pixel crops, which are four times cheaper and teach edges and textures
    as well; the rest sees whole drawings, so that positions far from the border are normal too.
    """
    torch.manual_seed(settings.seed)
    vae = create_vae()
    drawings = np.load(drawings_path, mmap_mode="r")

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        crop = step < _CROP_SHARE * settings.steps
        count = batch_size * 3 if crop else batch_size
        rows = torch.randint(len(drawings), (count,), generator=generator)
        images = as_images(drawings[rows.numpy()]) * 2 - 1
        if crop:
            half = IMAGE_SIZE // 2
            # Crops around the middle of the drawing: a corner would often hold nothing but background.
            places = torch.randint(4, half - 4, (2, count), generator=generator).tolist()
            images = torch.stack(
                [image[:, y : y + half, x : x + half] for image, y, x in zip(images, *places, strict=True)]
            )
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            mean, deviation, log_variance = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
            latents = mean + deviation * torch.randn(mean.shape, generator=generator)
            decoded = vae.decode(latents).sample.float()
        divergence = 0.5 * (mean.square() + deviation.square() - 1 - log_variance).mean()
        # The difference of neighbouring pixels carries the textures and outlines that a plain pixel loss blurs.
        slopes = [functional.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)]
        difference = functional.l1_loss(decoded, images) + functional.mse_loss(decoded, images)
        loss: torch.Tensor = difference + _GRADIENT_WEIGHT * (slopes[0] + slopes[1]) + _KL_WEIGHT * divergence
        return loss

    return train(vae, loss_function, settings, folder)


@torch.no_grad()
def finished_vae(drawings_path: Path, folder: Path) -> AutoencoderKL:
    """The trained autoencoder with averaged weights, rescaled so that every latent channel has mean 0, variance 1.

    The rescaling is folded into the 1x1 convolutions on both sides of the latents, hence ``scaling_factor`` is 1 and
    the latents of every channel are on the scale that the diffusion process expects.
    """
    vae = create_vae()
    load_averaged_weights(vae, folder)
    vae.eval().requires_grad_(False)
    drawings = np.load(drawings_path, mmap_mode="r")
    images = as_images(drawings[: min(1024, len(drawings))]) * 2 - 1
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(64)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    # Channels 0..3 of quant_conv are means, 4..7 log variances.
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.bias[4:] -= 2 * deviation.log()
    post_quant.bias += (post_quant.weight[:, :, 0, 0] * mean).sum(1)
    post_quant.weight *= deviation[None, :, None, None]
    return vae


def encode_drawings(drawings_path: Path, folder: Path, latents_path: Path, processes: int) -> None:
    """Latent means of all drawings as .npy, (drawings, 4, 16, 16) float16, by the autoencoder trained in ``folder``."""
    if latents_path.exists():
        return
    weights = folder / "finished.unfinished"
    torch.save(finished_vae(drawings_path, folder).state_dict(), weights)
    count = len(np.load(drawings_path, mmap_mode="r"))
    unfinished = latents_path.with_suffix(".unfinished")
    np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float16, shape=(count, 4, 16, 16)).flush()
    bounds = [count * part // processes for part in range(processes + 1)]
    tasks = [(drawings_path, weights, unfinished, start, end) for start, end in itertools.pairwise(bounds)]
    if processes == 1:
        _encode_part(tasks[0])
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.map(_encode_part, tasks)
    weights.unlink()
    unfinished.replace(latents_path)


@torch.no_grad()
def _encode_part(task: tuple[Path, Path, Path, int, int]) -> None:
    drawings_path, weights, latents_path, start, end = task
    torch.set_num_threads(1)
    vae = create_vae()
    vae.load_state_dict(torch.load(weights, weights_only=True))
    vae.eval()
    drawings = np.load(drawings_path, mmap_mode="r")
    latents = np.lib.format.open_memmap(latents_path, mode="r+")
    for first in range(start, end, _ENCODE_BATCH):
        rows = slice(first, min(first + _ENCODE_BATCH, end))
        with torch.autocast("cpu", torch.bfloat16):
            encoded = vae.encode(as_images(drawings[rows]) * 2 - 1).latent_dist.mean
        latents[rows] = encoded.to(torch.float16).numpy()
    latents.flush()
