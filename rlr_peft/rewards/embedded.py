"""Rewards that need no download: the size as a JPEG file, and two judges that read the attributes of tiny-shapes.

Both judges were trained on drawings alone, with different architectures, seeds and augmentations. ``reward`` is meant
to be trained against; ``heldout`` never is, so it shows when a pipeline learns to please ``reward`` rather than the
prompt.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as functional
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.names import SPEC_OF_JUDGE
from rlr_peft.rewards.preprocessing import to_8_bit
from rlr_peft.rewards.scores import Info, describe_samples
from rlr_peft.tiny_shapes import ATTRIBUTES, IMAGE_SIZE, judges_path, parse_caption

JPEG_QUALITY = 95
JPEG_SIDE = 65_500  # pixels, the most that the library behind Pillow writes
BYTES_PER_KILOBYTE = 1000  # kB, not KiB


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as a JPEG of quality 95.

    Args:
        images: (B, 3, H, W) in [0, 1]; rounded to 8 bits.

    Returns:
        (B,) float32, in kB of 1000 bytes, on the CPU.

    Raises:
        RewardError: images that are too long for a JPEG.
    """
    if max(images.shape[2:]) > JPEG_SIDE:
        raise RewardError(
            f"JPEG size: expected images of at most {JPEG_SIDE} pixels a side, got {images.shape[3]} x "
            f"{images.shape[2]}; use smaller ones."
        )
    sizes = []
    for image in to_8_bit(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(len(file.getvalue()) / BYTES_PER_KILOBYTE)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegReward(Reward):
    """Plus or minus the JPEG size in kB.

    Args:
        compressible: True rewards small files (`jpeg-compressibility`), False rewards large ones
            (`jpeg-incompressibility`).
    """

    overlaps = True

    def __init__(self, compressible: bool) -> None:
        self.name = "jpeg-compressibility" if compressible else "jpeg-incompressibility"
        self._sign = -1.0 if compressible else 1.0

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Prompts and metadata are not looked at."""
        return Scored(self._sign * jpeg_kilobytes(images))


# Surprise, in nats, at which an attribute scores one half.
HALF_SCORE_SURPRISE = 10.0


class TinyShapesJudgeReward(Reward):
    """How well the image shows what the prompt asks, in (0, 1], averaged over the attributes that the prompt names.

    An attribute scores ``c / (c + surprise)``, with ``surprise = -log p`` of the asked value and c = 10 nats: 1 where
    the judge is sure, 1/2 at p = e^-10. Between two bad choices: the log-probability itself has heavy tails that drown
    the mean, and the probability is a step that has no slope where the image is plainly wrong (p = e^-30 is common).

    Args:
        judge: "reward" (to train against) or "heldout" (never to be trained against).
        attribute: ask for this attribute only, for example "texture"; None asks for all that the prompt names.
        device: where the judge runs; images are moved there.

    Raises:
        RewardError: unknown attribute.
    """

    differentiable = True

    def __init__(self, judge: JudgeName, attribute: str | None = None, device: str | torch.device = "cpu") -> None:
        if attribute is not None and attribute not in ATTRIBUTES:
            raise RewardError(f"unknown tiny-shapes attribute '{attribute}'; there are: {', '.join(ATTRIBUTES)}")
        self.name = SPEC_OF_JUDGE[judge] + (f"/{attribute}" if attribute else "")
        self.attribute = attribute
        self.device = torch.device(device)
        self._judge = load_judge(judge).to(self.device)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Score a batch.

        Args:
            images: (B, 3, H, W) in [0, 1]; the judge itself resizes to 64x64.
            prompts: B prompts in the words of tiny-shapes.
            metadata: not looked at.

        Returns:
            (B,) float32 in (0, 1] on the images' device, differentiable with respect to the images; and as info, if
            several attributes are asked for, their single scores, NaN where the prompt does not name it, and
            `all_right`: 1 where the judge reads every one of them as the prompt says, else 0.

        Raises:
            RewardError: a prompt is not in the words of tiny-shapes, or does not name what is asked.
        """
        asked = [self._asked_values(index, prompts) for index in range(len(prompts))]
        log_probabilities = self._judge(images.to(self.device, torch.float32))
        total = torch.zeros(len(prompts), device=self.device)
        info: Info = {}
        right = torch.ones(len(prompts), dtype=torch.bool)
        for attribute, words in ATTRIBUTES.items():
            rows = [index for index, values in enumerate(asked) if attribute in values]
            columns = [words.index(asked[index][attribute]) for index in rows]
            if rows:
                surprise = -log_probabilities[attribute][rows, columns]
                scores = HALF_SCORE_SURPRISE / (HALF_SCORE_SURPRISE + surprise)
                total = total.index_add(0, torch.tensor(rows, device=self.device), scores)
                info[attribute] = torch.full((len(prompts),), math.nan).index_copy_(
                    0, torch.tensor(rows), scores.detach().float().cpu()
                )
                right[rows] &= log_probabilities[attribute][rows].argmax(1).cpu() == torch.tensor(columns)
        info["all_right"] = right.float()
        counts = torch.tensor([len(values) for values in asked], device=self.device)
        return Scored((total / counts).to(images.device), info={} if self.attribute else info)

    def check_prompts(self, prompts: list[str], metadata: Metadata) -> None:
        """Refuses those that are not in the words of tiny-shapes, or do not name what is asked."""
        for index in range(len(prompts)):
            self._asked_values(index, prompts)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 128) float32 on the images' device: what the judge's classifiers see of images (B, 3, H, W) in [0, 1]."""
        with torch.no_grad():
            return self._judge.features(images.to(self.device, torch.float32)).to(images.device)

    def _asked_values(self, index: int, prompts: list[str]) -> dict[str, str]:
        sample = describe_samples([index], prompts)
        try:
            values = parse_caption(prompts[index])
        except ValueError as error:
            raise RewardError(
                f"reward '{self.name}' cannot read the prompt of {sample}: {error}. It only judges prompts written in "
                "the words of tiny-shapes, such as those of `tiny-shapes/train`; use another reward for other prompts"
            ) from error
        if self.attribute is not None:
            if self.attribute not in values:
                raise RewardError(
                    f"reward '{self.name}': the prompt of {sample} does not name the attribute '{self.attribute}'; "
                    f"add one of: {', '.join(ATTRIBUTES[self.attribute])}"
                )
            return {self.attribute: values[self.attribute]}
        if not values:
            raise RewardError(
                f"reward '{self.name}': the prompt of {sample} names no attribute at all; "
                f"name at least one of: {', '.join(ATTRIBUTES)}"
            )
        return values


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
