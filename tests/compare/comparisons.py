"""Evaluations made by hand, for tests of what is told about them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlr_peft.compare import Comparison, Evaluation, MeasuredReward, Model, make_pictures
from rlr_peft.prompt import PromptLike

TRAINED, HELDOUT = MeasuredReward("reward", "judge"), MeasuredReward("heldout", "other judge", heldout=True)


def flat_images(levels: Sequence[float], side: int = 24, color: int = 0) -> Tensor:
    """One-coloured images (N, 3, side, side): `levels` of red, green or blue on black."""
    images = torch.zeros(len(levels), 3, side, side)
    images[:, color] = torch.tensor(levels)[:, None, None]
    return images


def evaluation(
    scores: Mapping[str, Sequence[float]],
    *,
    images: Tensor | None = None,
    prompts: Sequence[PromptLike] | None = None,
    info: Mapping[str, Sequence[float]] | None = None,
    features: Tensor | None = None,
) -> Evaluation:
    """An evaluation with these scores; prompts `prompt 0`, `prompt 1`, ... and seeds from 100 on."""
    count = len(next(iter(scores.values())))
    images = flat_images([index / count for index in range(count)]) if images is None else images
    return Evaluation(
        prompts=[f"prompt {index}" for index in range(count)] if prompts is None else list(prompts),
        seeds=list(range(100, 100 + count)),
        scores={name: torch.tensor(values) for name, values in scores.items()},
        images=torch.empty(0),
        info={name: torch.tensor(values) for name, values in (info or {}).items()},
        features=features,
        pictures=make_pictures(images),
    )


def comparison(
    base: Evaluation,
    *adapters: Evaluation,
    rewards: Sequence[MeasuredReward] = (TRAINED,),
    divergences: Sequence[Tensor | None] = (),
    facts: Mapping[str, str] | None = None,
) -> Comparison:
    """A comparison of adapters called `first`, `second`, ..."""
    names = ("first", "second", "third")
    padded = [*divergences, *[None] * len(adapters)]
    models = [Model(name, drawn, kl) for name, drawn, kl in zip(names, adapters, padded, strict=False)]
    return Comparison(rewards, Model("base", base), models, facts or {}, "features made by hand")
