"""Training of the two judges on drawings, each with its own augmentations."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL

from benchmarks.tiny_shapes.dataset import as_images, label_table
from benchmarks.tiny_shapes.loop import LoopSettings, load_averaged_weights, train
from rlr_peft.rewards import Judge, JudgeName, create_judge
from rlr_peft.tiny_shapes import ATTRIBUTES, IMAGE_SIZE

Augmentation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def train_judge(
    name: JudgeName,
    drawings_path: Path,
    folder: Path,
    settings: LoopSettings,
    batch_size: int,
    vae: AutoencoderKL | None = None,
) -> bool:
    """Train one judge; returns whether all steps are done.

    Args:
        name: Which judge. ``reward`` sees noise, blur, small shifts and colour changes; ``heldout`` sees
            reconstructions by the autoencoder, changed contrast, covered patches and coarse noise.
        drawings_path: The training drawings.
        folder: Where checkpoints and log go.
        settings: Knobs of the loop.
        batch_size: Images per step.
        vae: The finished autoencoder, for ``heldout``.
    """
    torch.manual_seed(settings.seed)
    judge = create_judge(name)
    drawings = np.load(drawings_path, mmap_mode="r")
    labels = label_table()
    augment = _reward_augmentation if name == "reward" else _heldout_augmentation(vae)

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(drawings), (batch_size,), generator=generator)
        images = augment(as_images(drawings[rows.numpy()]), generator)
        with torch.autocast("cpu", torch.bfloat16):
            log_probabilities = judge(images)
        targets = labels[rows % len(labels)]
        losses = [
            functional.nll_loss(log_probabilities[attribute].float(), targets[:, column])
            for column, attribute in enumerate(ATTRIBUTES)
        ]
        return torch.stack(losses).mean()

    return train(judge, loss_function, settings, folder)


def finished_judge(name: JudgeName, folder: Path) -> Judge:
    """The trained judge with averaged weights, in evaluation mode."""
    judge = create_judge(name)
    load_averaged_weights(judge, folder)
    return judge.eval().requires_grad_(False)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _reward_augmentation(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count = len(images)
    images = images + _uniform(-0.05, 0.05, (count, 3, 1, 1), generator)
    # A blur of random strength: mix with the average of each pixel's neighbourhood.
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, _uniform(0, 1, (count, 1, 1, 1), generator))
    across, down = torch.randint(-2, 3, (2,), generator=generator).tolist()
    padded = functional.pad(images, (2, 2, 2, 2), mode="replicate")
    images = padded[:, :, 2 + down : 2 + down + IMAGE_SIZE, 2 + across : 2 + across + IMAGE_SIZE]
    noise = torch.randn(images.shape, generator=generator)
    return (images + _uniform(0, 0.1, (count, 1, 1, 1), generator) * noise).clamp(0, 1)


def _heldout_augmentation(vae: AutoencoderKL | None) -> Augmentation:
    if vae is None:
        raise ValueError("the held-out judge is trained on reconstructions and needs the autoencoder")

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count = len(images)
        quarter = count // 4
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images[:quarter] * 2 - 1).latent_dist.mean
            spread = _uniform(0, 0.25, (quarter, 1, 1, 1), generator)
            latents = latents + spread * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents).sample.float() / 2 + 0.5
        images = torch.cat([decoded, images[quarter:]])
        middle = images.mean((2, 3), keepdim=True)
        images = middle + (images - middle) * _uniform(0.85, 1.15, (count, 1, 1, 1), generator)
        coarse = torch.randn((count, 3, IMAGE_SIZE // 8, IMAGE_SIZE // 8), generator=generator)
        noise = functional.interpolate(coarse, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
        images = images + _uniform(0, 0.06, (count, 1, 1, 1), generator) * noise
        side = IMAGE_SIZE // 8
        for image, covered in zip(images, torch.rand(count, generator=generator).tolist(), strict=True):
            if covered < 0.3:
                y, x = torch.randint(IMAGE_SIZE - side, (2,), generator=generator).tolist()
                image[:, y : y + side, x : x + side] = 0.5
        return images.clamp(0, 1)

    return augment
