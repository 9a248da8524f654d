"""Rewards that need no download: the size as a JPEG file, and the two judges of tiny-shapes."""

from __future__ import annotations

import io
import math

import torch
from PIL import Image
from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.names import SPEC_OF_JUDGE
from rlr_peft.rewards.preprocessing import to_8_bit
from rlr_peft.rewards.scores import Info, describe_samples
from rlr_peft.tiny_shapes.judges import JudgeName, load_judge
from rlr_peft.tiny_shapes.scenes import ATTRIBUTES, parse_caption

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
