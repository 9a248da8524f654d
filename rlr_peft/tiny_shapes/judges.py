"""Two judges that read every attribute of a scene off an image.

Both were trained on drawings alone, with different architectures, seeds and augmentations. ``reward`` is meant to be
trained against; ``heldout`` never is, so it shows when a pipeline learns to please ``reward`` rather than the prompt.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import nn

from rlr_peft.tiny_shapes import IMAGE_SIZE, judges_path
from rlr_peft.tiny_shapes.scenes import ATTRIBUTES

JudgeName = Literal["reward", "heldout"]
JUDGE_NAMES: tuple[JudgeName, ...] = ("reward", "heldout")


class Judge(nn.Module):
    """A trunk that keeps a small feature map, and one linear classifier per attribute.

    Args:
        trunk: Maps images (B, 3, 64, 64) in [-1, 1] to features (B, F).
        features: F.
    """

    def __init__(self, trunk: nn.Module, features: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Log-probabilities of every attribute's values.

        Args:
            images: (B, 3, H, W), RGB in [0, 1]; other sizes than 64x64 are resized. Gradients flow back to them.

        Returns:
            Per attribute (B, classes), the classes in the order of ``ATTRIBUTES``.
        """
        features = self.features(images)
        return {name: functional.log_softmax(head(features), dim=1) for name, head in self.heads.items()}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the classifiers see: (B, F) of images (B, 3, H, W) in [0, 1]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have the shape (B, 3, H, W), not {tuple(images.shape)}")
        if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = functional.interpolate(
                images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False, antialias=True
            )
        features: torch.Tensor = self.trunk(images * 2 - 1)
        return features


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = hidden + self.body(hidden)
        return changed


class _SeparableBlock(nn.Module):
    """Depthwise 5x5 convolution, then two pointwise ones, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = hidden + self.body(hidden)
        return changed


def _residual_trunk(features: int) -> nn.Module:
    """Strided 3x3 convolutions with residual blocks down to a 4x4 map, which is flattened."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(24, 48, 4, stride=2, padding=1),
        _ResidualBlock(48),
        nn.Conv2d(48, 64, 4, stride=2, padding=1),
        _ResidualBlock(64),
        nn.Conv2d(64, 32, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, features),
        nn.SiLU(),
    )


def _separable_trunk(features: int) -> nn.Module:
    """Non-overlapping patches, then depthwise blocks down to an 8x8 map, which is flattened."""
    return nn.Sequential(
        nn.Conv2d(3, 48, 4, stride=4),
        nn.GroupNorm(1, 48),
        _SeparableBlock(48),
        _SeparableBlock(48),
        nn.Conv2d(48, 80, 2, stride=2),
        _SeparableBlock(80),
        _SeparableBlock(80),
        nn.GroupNorm(1, 80),
        nn.Conv2d(80, 12, 1),
        nn.Flatten(),
        nn.Linear(12 * 64, features),
        nn.GELU(),
    )


def create_judge(name: JudgeName) -> Judge:
    """An untrained judge."""
    if name == "reward":
        return Judge(_residual_trunk(128), 128)
    if name == "heldout":
        return Judge(_separable_trunk(128), 128)
    raise ValueError(f"unknown judge {name!r}; there are: {', '.join(JUDGE_NAMES)}")


def judge_file(name: JudgeName, folder: Path | None = None) -> Path:
    """The safetensors file of a judge, among the shipped ones unless another folder is given."""
    return (folder or judges_path()) / f"{name}.safetensors"


def load_judge(name: JudgeName) -> Judge:
    """A shipped judge: trained, frozen, in evaluation mode, in float32 on the CPU."""
    judge = create_judge(name)
    judge.load_state_dict({key: value.float() for key, value in load_file(judge_file(name)).items()})
    return judge.eval().requires_grad_(False)
