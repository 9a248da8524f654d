"""What a reward is, and the one door through which trainer and evaluation ask it for scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlr_peft.prompt import PromptLike, as_prompts, texts_of
from rlr_peft.rewards.scores import (
    Info,
    RewardError,
    check_scores,
    describe_samples,
    info_of,
    is_attached,
    mean_over_frames,
)

__all__ = [
    "Reward",
    "RewardError",
    "Scored",
    "check_scores",
    "describe_samples",
    "is_attached",
    "measure_images",
    "score_images",
    "settle_differentiable",
]


class Reward(Protocol):
    """Scores images; higher is better.

    A reward whose attribute `takes_video` is True gets videos (B, F, 3, H, W) whole; any other gets their frames as
    images, and the mean over the frames is the video's score.

    Attributes:
        name: short name used in metrics, figures and the model card; holds no path of this machine.
        differentiable: whether the scores carry a gradient to images that require one.
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor | tuple[Tensor, Mapping[str, Any]]:
        """Score a batch.

        Args:
            images: (B, 3, H, W), values in [0, 1].
            prompts: B prompts.
            metadata: B dictionaries with whatever the prompt source knows about each prompt besides its text.

        Returns:
            (B,) float32 scores; or those and info, numbers to be logged (see `info.info_of`).
        """
        ...


@dataclass(frozen=True)
class Scored:
    """What a reward said of a batch.

    Attributes:
        scores: (B,) finite float32.
        info: name -> (B,) float32 numbers to be logged; NaN where a sample has none.
    """

    scores: Tensor
    info: Info = field(default_factory=dict)


def score_images(
    reward: Reward, images: Tensor, prompts: Sequence[PromptLike], metadata: Sequence[dict[str, Any]] | None = None
) -> Tensor:
    """The scores of `measure_images`, (B,)."""
    return measure_images(reward, images, prompts, metadata).scores


def measure_images(
    reward: Reward, images: Tensor, prompts: Sequence[PromptLike], metadata: Sequence[dict[str, Any]] | None = None
) -> Scored:
    """Call `reward` and check what it returns.

    Args:
        reward: the reward.
        images: (B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1]. When they require grad and the reward is
            differentiable, the scores stay attached to them; otherwise the reward sees detached images and the scores
            carry no gradient. A reward without `takes_video` sees the frames as images; a video's score is their mean.
        prompts: B prompts.
        metadata: B dictionaries, or None for those that the prompts carry.

    Returns:
        (B,) finite float32 scores on the images' device, and the reward's info.

    Raises:
        RewardError: wrong inputs, images that are not finite, or scores that `check_scores` refuses.
    """
    texts, metadata = _told(prompts, metadata)
    _check_inputs(reward, images, texts, metadata)
    if images.ndim == 5 and not getattr(reward, "takes_video", False):
        return _measure_frames(reward, images, texts, metadata)
    if images.requires_grad and torch.is_grad_enabled() and settle_differentiable(reward, images, texts, metadata):
        returned = reward(images, texts, metadata)
        scores = check_scores(reward.name, returned, texts, attached_to=images)
    else:
        with torch.no_grad():
            returned = reward(images.detach(), texts, metadata)
        scores = check_scores(reward.name, returned, texts).detach().to(images.device)
    return Scored(scores, info_of(returned, len(prompts)))


def settle_differentiable(
    reward: Reward, images: Tensor, prompts: Sequence[PromptLike], metadata: Sequence[dict[str, Any]] | None = None
) -> bool:
    """Whether `reward` is differentiable, asking it to find out on these images if it does not know yet.

    Only user callables without a `differentiable` attribute need the images (see `callables.CallableReward.probe`);
    for all other rewards this reads the attribute. Of videos a reward without `takes_video` tries the first frames.
    """
    probe = getattr(reward, "probe", None)
    if probe is not None:
        texts, metadata = _told(prompts, metadata)
        if images.ndim == 5 and not getattr(reward, "takes_video", False):
            images = images[:, 0]
        return bool(probe(images, texts, metadata))
    return reward.differentiable


def _told(
    prompts: Sequence[PromptLike], metadata: Sequence[dict[str, Any]] | None
) -> tuple[list[str], list[dict[str, Any]]]:
    """What a reward is told of prompts: their texts, and the metadata given or else carried by them, as copies."""
    if metadata is None:
        metadata = [dict(prompt.metadata) for prompt in as_prompts(prompts)]
    return texts_of(prompts), list(metadata)


def _measure_frames(reward: Reward, videos: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
    """Mean over the frames of what an image reward says of each."""
    num_frames = videos.shape[1]
    measured = measure_images(
        reward,
        videos.flatten(0, 1),
        [prompt for prompt in prompts for _ in range(num_frames)],
        [entry for entry in metadata for _ in range(num_frames)],
    )
    return Scored(measured.scores.reshape(-1, num_frames).mean(1), mean_over_frames(measured.info, num_frames))


def _check_inputs(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
    takes_video = getattr(reward, "takes_video", False)
    fits = images.ndim == 5 or (images.ndim == 4 and not takes_video)
    if not fits or images.shape[-3] != 3 or images.shape[0] != len(prompts):
        expected = f"({len(prompts)}, 3, height, width), or videos ({len(prompts)}, frames, 3, height, width)"
        if takes_video:
            expected = f"({len(prompts)}, frames, 3, height, width): this reward judges videos"
        raise RewardError(
            f"reward '{reward.name}': expected images of shape {expected}, one per prompt, got {tuple(images.shape)}"
        )
    if len(metadata) != len(prompts):
        raise RewardError(f"reward '{reward.name}': got {len(prompts)} prompts but {len(metadata)} metadata entries")
    # A file size, or a server that gets 8-bit pixels, would give a plausible score to an image that is none.
    bad = [i for i, finite in enumerate(images.detach().isfinite().flatten(1).all(1).tolist()) if not finite]
    if bad:
        raise RewardError(
            f"reward '{reward.name}': expected finite images, got NaN or infinity in {len(bad)} of {len(prompts)}: "
            f"{describe_samples(bad, prompts)}. A decoder in fp16 may overflow: use bf16 or fp32, or a VAE made for "
            "fp16 (--pretrained_vae_model_name_or_path)"
        )
