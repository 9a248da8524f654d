"""Draws and scores images of given prompts and seeds with one pipeline; of two pipelines the paired differences."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from rlr_peft.build.processes import Processes
from rlr_peft.figures import FRAMES_OF_STRIP, as_images
from rlr_peft.prompt import Prompt, texts_of
from rlr_peft.rewards.base import Reward, measure_images
from rlr_peft.rewards.preprocessing import to_8_bit
from rlr_peft.rewards.scores import Info, join_info

# Draws one image per prompt, whose noise depends on its own seed alone: (prompts, seeds) -> (B, 3, H, W) in [0, 1],
# or one video: (B, F, 3, H, W).
Render = Callable[[list[Prompt], list[int]], Tensor]


T = TypeVar("T")


class FeatureExtractor(Protocol):
    """Turns images into features.

    Attributes:
        name: what it is, in words for the page.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """(B, D) float32 on the CPU, of images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Evaluation:
    """What one pipeline reached on its prompts and seeds.

    Attributes:
        prompts: of the n images.
        seeds: of the n images.
        scores: per reward (n,) float32 on the CPU.
        images: (k, 3, H, W) in [0, 1] on the CPU, the first k <= n images, for figures; of videos strips of frames.
        info: numbers that the rewards give beside their scores for every image, `REWARD/NAME` -> (n,).
        features: (n, D) float32 on the CPU, by which sets of images are compared; None if no extractor was given.
        pictures: all n images as small files for a page.
    """

    prompts: list[Prompt]
    seeds: list[int]
    scores: dict[str, Tensor]
    images: Tensor
    info: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    pictures: list[Picture] = field(default_factory=list)


def prompts_and_seeds(
    prompts: Sequence[Prompt], num_images: int, seed: int, images_per_prompt: int = 1
) -> tuple[list[Prompt], list[int]]:
    """Which images to draw: prompts in shuffled order, again and again, and a seed for each image.

    The order is shuffled so that fewer images than prompts are still a fair sample of them. More images start with
    those of fewer, as long as the prompts are the same.

    Args:
        prompts: at least one.
        num_images: at least one.
        seed: of the order and of the images' seeds.
        images_per_prompt: images of a prompt that follow each other; the variety within a prompt needs at least two.

    Returns:
        (num_images prompts, num_images seeds).
    """
    if not prompts or num_images < 1 or images_per_prompt < 1:
        raise ValueError(
            f"expected at least one prompt, one image and one image per prompt, got {len(prompts)}, {num_images} and "
            f"{images_per_prompt}"
        )
    # SeedSequence promises the same numbers on every platform and in every version of numpy.
    words = numpy.random.SeedSequence(seed).generate_state(len(prompts) + num_images, numpy.uint32)
    order = numpy.argsort(words[: len(prompts)], kind="stable")
    chosen = [prompts[order[index // images_per_prompt % len(prompts)]] for index in range(num_images)]
    return chosen, [int(word) for word in words[len(prompts) :]]


def evaluate(
    render: Render,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    rewards: Mapping[str, Reward],
    batch_size: int,
    *,
    num_kept_images: int = 6,
    features: FeatureExtractor | None = None,
    description: str = "Evaluating",
    processes: Processes | None = None,
) -> Evaluation:
    """Draw and score one image for every prompt and seed.

    Args:
        render: draws a batch, an image's noise from its own seed alone. Called under `no_grad`.
        prompts: n prompts.
        seeds: n seeds.
        rewards: by the name under which the scores are kept, for example "reward" and "heldout".
        num_kept_images: how many of the first images to keep.
        features: keeps the features of every image.
        processes: share the batches out, and all get the whole evaluation; None for this process alone.

    Raises:
        ValueError: prompts and seeds differ in number, or `render` returns something else than B images in [0, 1].
        RewardError: a reward fails.
    """
    if len(prompts) != len(seeds) or not prompts or batch_size < 1:
        raise ValueError(
            f"expected as many seeds as prompts, at least one, and batch_size >= 1; got {len(prompts)} prompts, "
            f"{len(seeds)} seeds, batch_size {batch_size}"
        )

    def measure(batch: slice) -> _Batch:
        batch_prompts, start = list(prompts[batch]), batch.start
        images = render(batch_prompts, list(seeds[batch]))
        _check_images(images, len(batch_prompts))
        scored = {name: measure_images(reward, images, batch_prompts) for name, reward in rewards.items()}
        return _Batch(
            len(batch_prompts),
            {name: found.scores.cpu() for name, found in scored.items()},
            {name: {key: value.cpu() for key, value in found.logged.items()} for name, found in scored.items()},
            as_images(images[: num_kept_images - start].float().cpu()) if start < num_kept_images else None,
            features(images) if features is not None else None,
            make_pictures(images),
        )

    with torch.no_grad():
        batches = in_batches(measure, len(prompts), batch_size, description, processes, "the evaluation")
    kept = [batch.images for batch in batches if batch.images is not None]
    seen = [batch.features for batch in batches if batch.features is not None]
    return Evaluation(
        prompts=list(prompts),
        seeds=list(seeds),
        scores={name: torch.cat([batch.scores[name] for batch in batches]) for name in rewards},
        images=torch.cat(kept) if kept else torch.empty(0, 3, 0, 0),
        info=_complete_info({name: [(batch.info[name], batch.size) for batch in batches] for name in rewards}),
        features=torch.cat(seen) if seen else None,
        pictures=[picture for batch in batches for picture in batch.pictures],
    )


def in_batches(
    measure: Callable[[slice], T], total: int, batch_size: int, description: str, processes: Processes | None, name: str
) -> list[T]:
    """What is measured of every batch of images, with a bar.

    Args:
        measure: of some of the images, neighbours.
        processes: share the batches out, and all get all; None for this process alone.
        name: what is measured, for processes that wait.
    """
    batches, at_once = [slice(i, min(i + batch_size, total)) for i in range(0, total, batch_size)], 1
    with tqdm(total=total, desc=description, unit="image") as bar:

        def counted(batch: slice) -> T:
            found = measure(batch)
            bar.update(min(at_once * (batch.stop - batch.start), total - bar.n))
            return found

        if processes is None:
            return [counted(batch) for batch in batches]
        at_once = processes.count
        return processes.map(counted, batches, name)


@dataclass(frozen=True)
class _Batch:
    """What came of one batch: the fields of ``Evaluation``, by reward where there are several."""

    size: int
    scores: dict[str, Tensor]
    info: dict[str, Info]
    images: Tensor | None
    features: Tensor | None
    pictures: list[Picture]


def mean_and_standard_error(scores: Tensor, prompts: Sequence[str] | None = None) -> tuple[float, float]:
    """Mean of (n,) scores and its standard error, computed in float64.

    Images of one prompt are alike: more of them say less about other prompts than as many prompts would. So the error
    is that of the sums over each prompt (the cluster-robust one, Liang and Zeger 1986); of different prompts, or of a
    single one, it is the sample standard deviation / sqrt(n).

    Args:
        scores: at least two.
        prompts: of the n scores; None takes every score for itself.

    Raises:
        ValueError: fewer than two scores have no standard error.
    """
    if scores.ndim != 1 or len(scores) < 2:
        raise ValueError(f"expected at least 2 scores for a standard error, got shape {tuple(scores.shape)}")
    scores = scores.double()
    mean, groups = scores.mean(), independent_groups(prompts or range(len(scores)))
    sums = torch.zeros(max(groups) + 1, dtype=torch.float64).index_add_(0, torch.tensor(groups), scores - mean)
    count = len(sums)
    return mean.item(), math.sqrt(count / (count - 1) * sums.square().sum().item()) / len(scores)


def independent_groups(prompts: Sequence[object]) -> list[int]:
    """The number of every image's prompt, in order of appearance; of a single prompt every image counts for itself."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return [numbers[prompt] for prompt in prompts] if len(numbers) > 1 else list(range(len(prompts)))


def paired_gains(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """Paired comparison per reward.

    Returns:
        For each reward: `before`, `before_se`, `after`, `after_se` (means and their standard errors), `gain` (mean of
        after - before, image by image), `gain_se` (its paired standard error), `n` (images), `prompts` (how many of
        them) and `win_rate` (share of images that got better; ties count one half). The same for the info that both
        have. The errors take the images of one prompt together.

    Raises:
        ValueError: the two were not made from the same prompts, seeds and rewards, or hold fewer than two images.
    """
    prompts = texts_of(before.prompts)
    if prompts != texts_of(after.prompts) or before.seeds != after.seeds or before.scores.keys() != after.scores.keys():
        raise ValueError("expected the same prompts, seeds and rewards before and after; evaluate both on the same")
    comparison = {}
    for name, old, new in _pairs(before, after):
        old, new = old.double(), new.double()
        gain = new - old
        mean_before, se_before = mean_and_standard_error(old, prompts)
        mean_after, se_after = mean_and_standard_error(new, prompts)
        mean_gain, se_gain = mean_and_standard_error(gain, prompts)
        comparison[name] = {
            "before": mean_before,
            "before_se": se_before,
            "after": mean_after,
            "after_se": se_after,
            "gain": mean_gain,
            "gain_se": se_gain,
            "n": len(gain),
            "prompts": len(set(prompts)),
            "win_rate": ((gain > 0).double() + 0.5 * (gain == 0).double()).mean().item(),
        }
    return comparison


def _pairs(before: Evaluation, after: Evaluation) -> list[tuple[str, Tensor, Tensor]]:
    pairs = [(name, before.scores[name], after.scores[name]) for name in before.scores]
    return pairs + [(name, before.info[name], after.info[name]) for name in before.info if name in after.info]


def flat_metrics(comparison: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The comparison with one level of keys, as in `metrics.json`: `reward_before`, ..., `heldout_gain_se`, `n`."""
    shared = ("n", "prompts")
    flat = {
        f"{name}_{key}": value
        for name, values in comparison.items()
        for key, value in values.items()
        if key not in shared
    }
    first: Mapping[str, float] = next(iter(comparison.values()), {})
    return flat | {key: first[key] for key in shared if key in first}


def _complete_info(infos: Mapping[str, list[tuple[Info, int]]]) -> dict[str, Tensor]:
    """What can be compared of the rewards' info: numbers that are finite for every image."""
    joined = {name: join_info(parts) for name, parts in infos.items()}
    return {
        f"{name}/{key}": values
        for name, info in joined.items()
        for key, values in info.items()
        if bool(values.isfinite().all())
    }


def _check_images(images: Tensor, num_images: int) -> None:
    if images.ndim not in (4, 5) or images.shape[0] != num_images or images.shape[-3] != 3:
        raise ValueError(f"expected `render` to return ({num_images}, 3, height, width), got {tuple(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not (math.isfinite(low) and math.isfinite(high)) or low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}; decode and clamp them")


# Images up to this side are shown pixel by pixel; WebP would smear their edges.
SMALL_SIDE = 128  # pixels
LARGEST_SIDE = 512  # pixels, of an image or of one frame of a strip
QUALITY = 85  # of WebP, in percent


@dataclass(frozen=True)
class Picture:
    """One image, or of a video a strip of frames, as a file.

    Attributes:
        data: the file.
        mime_type: its kind.
        width: in pixels.
        height: in pixels.
        num_frames: frames side by side; 1 for an image.
    """

    data: bytes
    mime_type: str
    width: int
    height: int
    num_frames: int = 1

    @property
    def data_uri(self) -> str:
        """The file as a page's `src`."""
        return f"data:{self.mime_type};base64,{base64.b64encode(self.data).decode('ascii')}"


def make_pictures(images: Tensor) -> list[Picture]:
    """Pictures of images (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1]; no side of a frame is over 512 pixels."""
    num_frames = 1 if images.ndim == 4 else min(FRAMES_OF_STRIP, images.shape[1])
    return [_picture(image, num_frames) for image in as_images(images).detach().float().cpu()]


def _picture(image: Tensor, num_frames: int) -> Picture:
    picture = Image.fromarray(to_8_bit(image))
    width, height = picture.width // num_frames, picture.height
    scale = min(1.0, LARGEST_SIDE / max(width, height))
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(width, height) <= SMALL_SIDE:
        picture.save(buffer, format="PNG")
        return Picture(buffer.getvalue(), "image/png", picture.width, picture.height, num_frames)
    picture.save(buffer, format="WEBP", quality=QUALITY)
    return Picture(buffer.getvalue(), "image/webp", picture.width, picture.height, num_frames)
