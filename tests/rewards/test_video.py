"""Videos: frames for image rewards, whole videos for the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.reward_checkpoints import Sizes, write_dino
from rlr_peft.errors import RewardError
from rlr_peft.rewards import (
    ModelFiles,
    ModelSettings,
    Reward,
    RewardSettings,
    Scored,
    Term,
    WeightedRewards,
    imagenet_pixels,
    load_reward,
    measure_images,
    score_images,
    vbench_pixels,
)
from rlr_peft.rewards.model_files import DINO

VIDEOS = torch.rand(2, 3, 3, 24, 40, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b"]


class Brightness(Reward):
    name = "brightness"
    differentiable = True

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        weights = torch.tensor([entry["weight"] for entry in metadata])
        scores = images.mean((1, 2, 3)) * weights
        return Scored(scores, info={"raw": images.detach().mean((1, 2, 3))})


def test_an_image_reward_gets_every_frame_with_its_prompt_and_metadata_and_the_mean_counts() -> None:
    videos = VIDEOS.clone().requires_grad_(True)
    scored = measure_images(Brightness(), videos, PROMPTS, [{"weight": 1.0}, {"weight": 3.0}])
    expected = VIDEOS.mean((1, 2, 3, 4)) * torch.tensor([1.0, 3.0])
    assert torch.allclose(scored.scores, expected, atol=1e-6)
    assert torch.allclose(scored.info["raw"], VIDEOS.mean((1, 2, 3, 4)), atol=1e-6)
    (gradient,) = torch.autograd.grad(scored.scores.sum(), videos)
    assert torch.allclose(gradient[1], torch.full_like(gradient[1], 3 / VIDEOS[1].numel()))


def test_jpeg_size_of_a_video_is_the_mean_over_its_frames() -> None:
    reward = load_reward("jpeg-compressibility")
    frames = torch.stack([score_images(reward, VIDEOS[:, i], PROMPTS) for i in range(3)])
    assert torch.allclose(score_images(reward, VIDEOS, PROMPTS), frames.mean(0))


def test_a_callable_may_ask_for_whole_videos(tmp_path: Path) -> None:
    path = tmp_path / "motion.py"
    path.write_text(
        "def motion(videos, prompts):\n    return (videos[:, 1:] - videos[:, :-1]).abs().mean((1, 2, 3, 4))\n"
        "motion.takes_video = True\n"
    )
    scores = score_images(load_reward(f"{path}:motion"), VIDEOS, PROMPTS)
    assert torch.allclose(scores, 1 - score_images(load_reward("temporal-flicker"), VIDEOS, PROMPTS))


def test_a_callable_that_does_not_say_whether_it_is_differentiable_may_stand_beside_a_video_reward(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def mine(images, prompts):\n    return images.mean((1, 2, 3))\n")
    terms = [Term(load_reward(f"{path}:mine"), 2.0), Term(load_reward("temporal-flicker"), 1.0)]
    videos = VIDEOS.clone().requires_grad_(True)
    scores = score_images(WeightedRewards(terms, scaling="none"), videos, PROMPTS)
    flicker = score_images(load_reward("temporal-flicker"), VIDEOS, PROMPTS)
    assert scores.requires_grad and torch.allclose(scores, 2 * VIDEOS.mean((1, 2, 3, 4)) + flicker)


def test_temporal_flicker_is_one_for_a_still_and_loses_the_mean_change() -> None:
    reward = load_reward("temporal-flicker")
    still = VIDEOS[:, :1].expand(-1, 4, -1, -1, -1)
    assert score_images(reward, still, PROMPTS).tolist() == [1.0, 1.0]
    blinking = torch.zeros(1, 3, 3, 8, 8)
    blinking[:, 1] = 0.5
    assert score_images(reward, blinking, ["a"]).item() == pytest.approx(0.5)


@pytest.fixture(scope="module")
def consistency(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = write_dino(folder, Sizes())
    files = ModelFiles({DINO: str(folder)})
    return load_reward("subject-consistency", settings=RewardSettings(ModelSettings(files=files))), model


def published_pixels(frame: torch.Tensor) -> torch.Tensor:
    """VBench's way: 8-bit frames, resized without antialiasing and rounded; (3, 24, 40) -> (1, 3, 32, 53)."""
    resized = F.interpolate((frame[None] * 255).round(), size=(32, 53), mode="bilinear", antialias=False).round() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    return (resized - mean) / std


def test_vbench_pixels_are_the_published_ones_up_to_their_rounding() -> None:
    large = torch.rand(1, 3, 60, 100, generator=torch.Generator().manual_seed(1))
    for frames in (VIDEOS[0, :1], large):
        got = vbench_pixels(frames, 32)
        assert got.shape == (1, 3, 32, 53)
        assert (got - published_pixels(frames[0])).abs().max() < 1.01 / 255 / 0.224
    assert (vbench_pixels(large, 32) - imagenet_pixels(large, 32, 1)).abs().max() > 0.1, "antialiased is another thing"


def test_subject_consistency_is_the_mean_cosine_to_first_and_previous_frame(consistency: tuple[Any, Any]) -> None:
    reward, model = consistency
    expected = []
    for video in VIDEOS:
        with torch.no_grad():
            features = [
                model(pixel_values=published_pixels(frame), interpolate_pos_encoding=True).last_hidden_state[:, 0]
                for frame in video
            ]
        cosines = []
        for index in range(1, len(features)):
            to_first = F.cosine_similarity(features[0], features[index]).clamp(min=0)
            to_previous = F.cosine_similarity(features[index - 1], features[index]).clamp(min=0)
            cosines.append((to_first + to_previous) / 2)
        expected.append(torch.stack(cosines).mean())
    got = score_images(reward, VIDEOS, PROMPTS)
    assert torch.allclose(got, torch.stack(expected), atol=1e-4)  # of 8-bit rounding
    assert got.min() < 0.9999, "random frames must not count as the same"
    still = VIDEOS[:, :1].expand(-1, 3, -1, -1, -1)
    assert torch.allclose(score_images(reward, still, PROMPTS), torch.ones(2), atol=1e-5)


def test_subject_consistency_has_a_gradient(consistency: tuple[Any, Any]) -> None:
    videos = VIDEOS.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score_images(consistency[0], videos, PROMPTS).sum(), videos)
    assert gradient.isfinite().all() and all(float(frame.abs().sum()) > 0 for frame in gradient.flatten(0, 1))


@pytest.mark.parametrize("name", ["temporal-flicker"])
def test_video_rewards_refuse_images_and_single_frames(name: str) -> None:
    with pytest.raises(RewardError, match=r"\(2, frames, 3, height, width\): this reward judges videos"):
        score_images(load_reward(name), VIDEOS[:, 0], PROMPTS)
    with pytest.raises(RewardError, match="expected videos of 2 frames or more, got 1"):
        score_images(load_reward(name), VIDEOS[:, :1], PROMPTS)
