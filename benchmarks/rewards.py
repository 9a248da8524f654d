"""Rewards that only the benchmarks use."""

from typing import Any, ClassVar

import torch

from rlr_peft.rewards import JudgeName, Scored, TinyShapesJudgeReward


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean of all pixels, the coarsest thing an image has; (B,) in [0, 1]."""
    return images.mean((1, 2, 3))


class _WhateverThePromptSays(TinyShapesJudgeReward):
    """A judge asked for one and the same thing of every image: the base mostly draws another, so there is far to go.

    Attributes:
        judge: which judge.
        attribute_asked: what it is asked about.
        caption: the value it is asked for, as a prompt.
    """

    judge: ClassVar[JudgeName] = "reward"
    attribute_asked: ClassVar[str]
    caption: ClassVar[str]

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__(self.judge, self.attribute_asked, device)

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        """Scores (B,) in (0, 1]."""
        return super().__call__(images, [self.caption] * len(prompts), metadata)


class Centered(_WhateverThePromptSays):
    """The shape stands in the center: a coarse reward, settled by the early steps."""

    attribute_asked = "position"
    caption = "a shape in the center"


class CenteredHeldout(Centered):
    """The same, asked of the judge that is never trained against."""

    judge = "heldout"


class Star(_WhateverThePromptSays):
    """The shape is a star: a reward of the middle scale."""

    attribute_asked = "shape"
    caption = "a star"


class StarHeldout(Star):
    """The same, asked of the judge that is never trained against."""

    judge = "heldout"


class CenteredBlackBox(Centered):
    """The same without its gradient."""

    differentiable = False

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        """Scores (B,) in (0, 1]."""
        return super().__call__(images, prompts, metadata)


class AllRight(TinyShapesJudgeReward):
    """1 where the judge reads every attribute as the prompt says, else 0: no slope, as of a detector or a person.

    Attributes:
        judge: which judge.
    """

    judge: ClassVar[JudgeName] = "reward"
    differentiable = False

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__(self.judge, device=device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        """Scores (B,), 0 or 1."""
        return Scored(super().__call__(images, prompts, metadata).info["all_right"].to(images.device))


class AllRightHeldout(AllRight):
    """The same, asked of the judge that is never trained against."""

    judge = "heldout"
