"""How far images are from each other and from the base's: what falls, and what rises, when an adapter collapses.

The distance of two images is the cosine distance of their features, ``1 - cos``: 0 for the same direction, 1 for
orthogonal features, 2 at most. Features come from a network that is there already, where there is one. The distance of
two chains is the KL of their whole paths, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlr_peft.build.processes import Processes
from rlr_peft.chain.steps import Chain
from rlr_peft.compare.evaluation import FeatureExtractor, in_batches, independent_groups, mean_and_standard_error
from rlr_peft.errors import RewardError
from rlr_peft.estimators.kl import path_kl, reference_steps
from rlr_peft.foreign_text import shown_name
from rlr_peft.prompt import Prompt
from rlr_peft.rewards.base import Reward
from rlr_peft.rewards.model_files import MODEL_FILES, Part
from rlr_peft.rewards.model_reward import ModelSettings, loading
from rlr_peft.rewards.preprocessing import clip_pixels, imagenet_pixels
from rlr_peft.rewards.registry import RewardSettings, load_reward
from rlr_peft.tiny_shapes import PIPELINE_NAME

THUMBNAILS, AUTO = "thumbnails", "auto"
THUMBNAIL_SIDE = 16  # pixels
DINO_SIDE = 224  # pixels of the shortest side
CLIP_TYPES = ("clip", "clip_vision_model")
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers")


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error.

    Attributes:
        value: the number.
        error: its standard error; NaN where there is too little to tell.
        count: of how many independent values it was taken: prompts, or images of a single one.
    """

    value: float
    error: float
    count: int


@dataclass(frozen=True)
class Variety:
    """How different the images of one model are.

    Attributes:
        overall: mean distance over all pairs of images.
        within_prompt: mean over the prompts of the mean distance over the pairs of images of one prompt; None where no
            prompt has two images.
        overall_change: `overall` minus the base's; None for the base itself.
        within_prompt_change: `within_prompt` minus the base's.
        to_base: mean distance between an image and the base's image of the same prompt and seed; None for the base.
    """

    overall: Estimate
    within_prompt: Estimate | None
    overall_change: Estimate | None = None
    within_prompt_change: Estimate | None = None
    to_base: Estimate | None = None


def variety(features: Tensor, prompts: Sequence[str], base_features: Tensor | None = None) -> Variety:
    """Diversity of one model's images, and what became of the base's.

    Args:
        features: (n, D), n >= 2.
        prompts: the n prompts.
        base_features: (n, D) of the base's images of the same prompts and seeds; None for the base itself.

    Raises:
        ValueError: fewer than two images, or features that do not fit together.
    """
    if len(features) < 2 or len(features) != len(prompts):
        raise ValueError(f"expected 2 or more images, one per prompt, got {len(features)} and {len(prompts)} prompts")
    if base_features is not None and base_features.shape != features.shape:
        raise ValueError(f"expected features of one shape, got {tuple(features.shape)}, {tuple(base_features.shape)}")
    each, of_prompt = mean_distances(features), prompt_distances(features, prompts)
    if base_features is None:
        return Variety(_pairwise(each, prompts), _mean(of_prompt))
    base_of_prompt = prompt_distances(base_features, prompts)
    return Variety(
        overall=_pairwise(each, prompts),
        within_prompt=_mean(of_prompt),
        overall_change=_pairwise(each - mean_distances(base_features), prompts),
        within_prompt_change=_mean(of_prompt - base_of_prompt),
        to_base=_mean(1 - (_unit(features) * _unit(base_features)).sum(1), prompts),
    )


def mean_distances(features: Tensor) -> Tensor:
    """(n,) float64 mean distance of every image to the n - 1 others; their mean is the mean over all pairs.

    Through the sum of all directions: the n x n distances of many thousand images would take gigabytes.
    """
    unit = _unit(features)
    others = unit @ unit.sum(0) - unit.square().sum(1)
    return (1 - others / (len(unit) - 1)).clamp(min=0)


def prompt_distances(features: Tensor, prompts: Sequence[str]) -> Tensor:
    """(p,) mean distance over the pairs of images of each prompt that has two or more, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    means = [mean_distances(features[members]).mean() for members in groups.values() if len(members) > 1]
    return torch.stack(means) if means else torch.empty(0, dtype=torch.float64)


def _unit(features: Tensor) -> Tensor:
    features = features.double()
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)


def estimate_of(values: Tensor, prompts: Sequence[str] | None = None) -> Estimate:
    """Mean of (n,) values, n >= 1, with its error, which takes the images of one prompt together."""
    if len(values) < 2:
        return Estimate(values.double().mean().item(), math.nan, len(values))
    mean, error = mean_and_standard_error(values, prompts)
    return Estimate(mean, error, max(independent_groups(prompts or range(len(values)))) + 1)


def _mean(values: Tensor, prompts: Sequence[str] | None = None) -> Estimate | None:
    return None if len(values) == 0 else estimate_of(values, prompts)


def _pairwise(each: Tensor, prompts: Sequence[str]) -> Estimate:
    """The mean over pairs from every image's mean; its error is that of a U-statistic of order two (Hoeffding 1948)."""
    found = estimate_of(each, prompts)
    return Estimate(found.value, 2 * found.error if len(each) > 2 else math.nan, found.count)


# Samples every prompt from its seed and measures: (prompts, seeds) -> (B,) nats.
MeasureDivergence = Callable[[list[Prompt], list[int]], Tensor]


@torch.no_grad()
def path_divergence(chain: Chain, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
    """``KL(adapter || base)`` of sampled paths: the steps' KL in closed form, summed over all steps with noise.

    Averaged over samples this estimates, without bias, the KL of the paths' distributions, which bounds the KL of the
    images' from above.

    Args:
        chain: with the adapter, a reference (the base), and noise in at least one step.
        prompts: B prompts, sampled at once.
        seeds: B seeds.

    Returns:
        (B,) float32 in nats, on the CPU.

    Raises:
        NoDivergenceError: a chain without noise, whose paths have no density.
    """
    trajectory = chain.sample(prompts, seeds)
    references = reference_steps(chain, trajectory, "all", torch.Generator())
    return path_kl(trajectory, references).float().cpu()


def measure_divergence(
    measure: MeasureDivergence,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    batch_size: int,
    *,
    description: str = "Measuring KL",
    processes: Processes | None = None,
) -> Tensor:
    """The divergence of every sample, (n,) in nats.

    Args:
        measure: of one batch, such as `path_divergence` on a chain.
        prompts: n prompts.
        seeds: n seeds.
        processes: share the batches out, and all get the whole; None for this process alone.
    """

    def of_batch(batch: slice) -> Tensor:
        return measure(list(prompts[batch]), list(seeds[batch]))

    return torch.cat(in_batches(of_batch, len(prompts), batch_size, description, processes, "the divergence"))


class RewardFeatures:
    """The features in which a reward's network sees images.

    Args:
        reward: one with `image_features`.
    """

    def __init__(self, reward: Any) -> None:
        self._features = reward.image_features
        self.name = f"network of the reward {reward.name}"

    def __call__(self, images: Tensor) -> Tensor:
        return _over_frames(self._features, images)


class Thumbnails:
    """The pixels of the image at 16 x 16, less mid-gray: what is left where no network is at hand.

    They see layout and colours, not what is drawn; a model that draws one and the same image still shows.
    """

    name = f"thumbnails of {THUMBNAIL_SIDE} x {THUMBNAIL_SIDE} pixels"

    def __call__(self, images: Tensor) -> Tensor:
        def shrink(images: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(images.float(), THUMBNAIL_SIDE).flatten(1) - 0.5

        return _over_frames(shrink, images)


class VisionModelFeatures:
    """A vision model of `transformers`: CLIP's projected image embedding, or the class token of a ViT or DINOv2.

    Args:
        settings: how it is held and where it runs.

    Raises:
        RewardError: it cannot be found or loaded, or is of another type.
    """

    def __init__(self, name: str, settings: ModelSettings) -> None:
        from transformers import AutoConfig, AutoModel

        from rlr_peft.rewards.clip_rewards import load_clip_vision

        self._settings = settings
        user = f"features {name}"
        folder = settings.files.place(user, Part(name, MODEL_FILES))
        with loading(user, folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self._is_clip = config.model_type in CLIP_TYPES
        if config.model_type not in CLIP_TYPES + DINO_TYPES:
            raise RewardError(
                f"--features {name}: expected a model of type {', '.join(CLIP_TYPES + DINO_TYPES)}, got "
                f"{config.model_type}; for example facebook/dinov2-base or openai/clip-vit-base-patch32"
            )
        if self._is_clip:
            network: Any = load_clip_vision(user, folder, settings.dtype)
        else:
            with loading(user, folder):
                network = AutoModel.from_pretrained(folder, dtype=settings.dtype, trust_remote_code=False)
        self._network = network.to(settings.device).eval().requires_grad_(False)
        self.name = shown_name(name)

    def __call__(self, images: Tensor) -> Tensor:
        return _over_frames(self._of_images, images)

    def _of_images(self, images: Tensor) -> Tensor:
        network, images = self._network, images.to(self._settings.device)
        if self._is_clip:
            pixels = clip_pixels(images, network.config.image_size).to(network.dtype)
            return network(pixel_values=pixels).image_embeds
        patch = network.config.patch_size
        side = max(patch, min(DINO_SIDE, network.config.image_size) // patch * patch)
        pixels = imagenet_pixels(images, side, patch).to(network.dtype)
        resized = {"interpolate_pos_encoding": True} if network.config.model_type == "vit" else {}
        return network(pixel_values=pixels, **resized).last_hidden_state[:, 0]


def find_features(
    spec: str, base: str, rewards: Sequence[Reward], settings: ModelSettings | None = None
) -> FeatureExtractor:
    """The extractor that was asked for.

    Args:
        spec: `auto`, `thumbnails`, or the Hub id or folder of a vision model. `auto` takes the held-out judge on
            tiny-shapes; elsewhere the network of the last reward that has one, so that a held-out one comes before the
            one that was trained on; and thumbnails where there is none. It downloads nothing.
        rewards: all that are measured, held-out ones last.
        settings: how a vision model is held.

    Raises:
        RewardError: the model cannot be loaded.
    """
    settings = settings or ModelSettings()
    if spec == THUMBNAILS:
        return Thumbnails()
    if spec != AUTO:
        return VisionModelFeatures(spec, settings)
    if base == PIPELINE_NAME:
        return RewardFeatures(load_reward("tiny-shapes-heldout", RewardSettings(settings)))
    seeing = [part for reward in rewards for part in reward.parts if hasattr(part, "image_features")]
    return RewardFeatures(seeing[-1]) if seeing else Thumbnails()


@torch.no_grad()
def _over_frames(features: Any, images: Tensor) -> Tensor:
    """Of videos the mean over their frames."""
    if images.ndim == 4:
        return features(images).float().cpu()
    return features(images.flatten(0, 1)).float().cpu().unflatten(0, images.shape[:2]).mean(1)
