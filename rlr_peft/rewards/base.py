"""What a reward is, and the one door through which everybody asks it for scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.prompt import Prompt, PromptLike, as_prompts, texts_of
from rlr_peft.rewards.preprocessing import condition_pixels
from rlr_peft.rewards.scores import Info, check_scores, describe_samples, join_info, mean_over_frames

Metadata = list[dict[str, Any]]
CONDITION_IMAGE = "condition_image"
"""In the metadata: the picture that a sample is drawn from, as a tensor."""


@dataclass(frozen=True)
class Scored:
    """What a reward said of a batch.

    Attributes:
        scores: (B,) finite float32.
        raw: of a reward that is made of several, the scores of each in its own units: name -> (B,) float32, detached,
            on the CPU.
        info: name -> (B,) float32 numbers that are only logged, on the CPU; NaN where a sample has none.
    """

    scores: Tensor
    raw: dict[str, Tensor] = field(default_factory=dict)
    info: Info = field(default_factory=dict)

    @property
    def logged(self) -> Info:
        """All numbers beside the scores."""
        return self.raw | self.info


class Reward(ABC):
    """Scores images; higher is better. A built-in reward is a subclass; a user's function becomes a `CallableReward`.

    A subclass needs a name and a call; all else is for rewards that learn from updates or are made of others.

    Attributes:
        name: short name used in metrics, figures and the model card; holds no path of this machine.
        differentiable: whether the scores carry a gradient to images that require one; None as long as that is not
            known, see `settle`.
        takes_video: True for a reward that gets videos (B, F, 3, H, W) whole; any other gets their frames as images,
            and the mean over the frames is the video's score.
        takes_images: of a reward with `takes_video`, whether single images will do as well.
        takes_latents: True for a reward that gets, in place of images, the clean latents (B, ...) that they would be
            decoded from, as the denoiser has them: scaled, and packed where the pipeline packs them.
        overlaps: True for a reward that may be asked in another thread, with images on the CPU, while the next images
            are sampled: one without gradient that waits for a server or works on the CPU, and that neither draws random
            numbers nor changes global state.
    """

    name: str
    differentiable: bool | None = False
    takes_video: bool = False
    takes_images: bool = False
    takes_latents: bool = False
    overlaps: bool = False

    @abstractmethod
    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Score a batch. `measure_images` calls it and checks the scores.

        Args:
            images: (B, 3, H, W), values in [0, 1].
            prompts: B texts.
            metadata: B dictionaries with whatever the prompt source knows about each prompt besides its text.
        """

    def settle(self, images: Tensor, prompts: list[str], metadata: Metadata) -> bool:
        """`differentiable`, which is found out on these images if it is not known yet; it does not change after that.

        Args: as of a call; videos too.
        """
        return bool(self.differentiable)

    def check_prompts(self, prompts: list[str], metadata: Metadata) -> None:  # noqa: B027
        """Refuses, before anything is trained, prompts that no image of theirs could be scored for.

        Raises:
            RewardError: there is one.
        """

    @property
    def parts(self) -> list[Reward]:
        """The rewards that it is made of; a plain one is its own only part."""
        return [self]

    @property
    def part_names(self) -> list[str]:
        """Their names in `Scored.raw`; none of a plain one."""
        return []

    def scales(self) -> dict[str, float]:
        """What the scores of its parts are divided by now; empty if they are not."""
        return {}

    def learn(self, raw: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Moves running statistics on, after an update.

        Args:
            raw: as in `Scored`, name -> (N,); of the samples of all processes, the same in each.
        """

    def on_first_scales(self) -> Reward:
        """The same reward on scales that do not move while training, by which early and late scores compare."""
        return self

    def scores_on_first_scales(self, scores: Tensor, raw: Mapping[str, Tensor]) -> Tensor:
        """What `on_first_scales` gives to images that got these scores (N,)."""
        return scores

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly: tensors, numbers, texts, and containers of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restores what `state_dict` returned."""


def refuse_latents(reward: Reward, where: str) -> None:
    """Raises RewardError for a reward of latents, where there are images alone: `where` says so."""
    if reward.takes_latents:
        raise RewardError(
            f"reward '{reward.name}' judges latents (takes_latents), but {where} images; take another one"
        )


def join_scored(parts: Sequence[Scored]) -> Scored:
    """One batch of several, of the same reward."""
    return Scored(
        torch.cat([part.scores for part in parts]),
        {name: torch.cat([part.raw[name] for part in parts]) for name in parts[0].raw},
        join_info((part.info, len(part.scores)) for part in parts),
    )


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
        images: (B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1]. When they require grad and the reward is
            differentiable, the scores stay attached to them; otherwise the reward sees detached images and the scores
            carry no gradient. A reward without `takes_video` sees the frames as images; a video's score is their mean.
            Latents (B, ...) for a reward with `takes_latents`.
        prompts: B prompts.
        metadata: B dictionaries, or None for those that the prompts carry.

    Returns:
        (B,) finite float32 scores on the images' device, and the reward's other numbers.

    Raises:
        RewardError: wrong inputs, images that are not finite, or scores that `check_scores` refuses.
    """
    texts = texts_of(prompts)
    metadata = [_told_of(prompt, images) for prompt in as_prompts(prompts)] if metadata is None else list(metadata)
    _check_inputs(reward, images, texts, metadata)
    if images.ndim == 5 and not reward.takes_video and not reward.takes_latents:
        return _measure_frames(reward, images, texts, metadata)
    if images.requires_grad and torch.is_grad_enabled() and reward.settle(images, texts, metadata):
        scored = reward(images, texts, metadata)
        scores = check_scores(reward.name, scored.scores, texts, attached_to=images)
    else:
        with torch.no_grad():
            scored = reward(images.detach(), texts, metadata)
        scores = check_scores(reward.name, scored.scores, texts).detach().to(images.device)
    return Scored(scores, scored.raw, scored.info)


def _told_of(prompt: Prompt, images: Tensor) -> dict[str, Any]:
    """A prompt's metadata, and, where it has a picture, that as `condition_image`, (3, H, W) in [0, 1]."""
    told = dict(prompt.metadata)
    if prompt.image is not None and images.shape[-3:-2] == (3,):  # no latents
        told[CONDITION_IMAGE] = condition_pixels(prompt.image, images.shape[-1], images.shape[-2]).to(images)
    return told


def _measure_frames(reward: Reward, videos: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
    """Mean over the frames of what an image reward says of each."""
    num_frames = videos.shape[1]
    measured = measure_images(
        reward,
        videos.flatten(0, 1),
        [prompt for prompt in prompts for _ in range(num_frames)],
        [entry for entry in metadata for _ in range(num_frames)],
    )
    return Scored(
        measured.scores.reshape(-1, num_frames).mean(1),
        mean_over_frames(measured.raw, num_frames),
        mean_over_frames(measured.info, num_frames),
    )


def _check_inputs(reward: Reward, images: Tensor, prompts: list[str], metadata: Metadata) -> None:
    only_videos = reward.takes_video and not reward.takes_images
    fits = images.ndim == 5 or (images.ndim == 4 and not only_videos)
    is_of_images = fits and images.shape[-3] == 3
    if not (is_of_images or reward.takes_latents) or images.shape[0] != len(prompts):
        expected = f"({len(prompts)}, 3, height, width), or videos ({len(prompts)}, frames, 3, height, width)"
        if only_videos:
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
