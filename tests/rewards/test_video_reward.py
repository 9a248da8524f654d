"""VideoReward on a tiny checkpoint with the published names, LoRA that is not merged, and real frames."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.large_parity import load, videoreward_parity
from benchmarks.reward_parity import mixed_images, to_tensor
from rlr_peft.errors import RewardError
from rlr_peft.plan import reward_memory
from rlr_peft.rewards import measure_images, score_images
from rlr_peft.rewards.model_files import QWEN2_VL_2B, VIDEO_REWARD, VIDEO_REWARD_CODE
from rlr_peft.rewards.video_rewards import frames_seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videoreward")


@pytest.fixture(scope="module")
def parity(folder: Path) -> dict[str, float]:
    with torch.random.fork_rng(devices=[]):
        return videoreward_parity(folder)


def reward(folder: Path, published: Path | None = None) -> Any:
    places = {QWEN2_VL_2B: folder / "qwen", VIDEO_REWARD_CODE: folder / "code.py"}
    return load("videoreward", places | {VIDEO_REWARD: published or folder / "published"})


def video(frames: int = 4) -> torch.Tensor:
    return (0.35 + 0.3 * to_tensor(mixed_images((40, 52), frames)))[None]  # off the clamps


def test_scores_are_those_of_the_published_forward_pass(parity: dict[str, float]) -> None:
    assert parity["spread"] > 0.05, "scores that are all alike would prove nothing"
    assert parity["network"] < 1e-4
    assert parity["whole"] < 0.1 * parity["spread"]


def test_gradients_match_finite_differences(folder: Path, parity: Any) -> None:
    judge, frames = reward(folder), video().requires_grad_(True)
    judge.network["model"].double()
    (gradient,) = torch.autograd.grad(score_images(judge, frames, ["a fox"]).sum(), frames)
    assert (gradient.abs().amax((0, 2, 3, 4)) > 0).all(), "every frame counts"
    direction, step = gradient / gradient.norm(), 0.001
    with torch.no_grad():
        ahead, behind = (score_images(judge, frames + sign * step * direction, ["a fox"]) for sign in (1, -1))
    assert float(ahead - behind) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_the_sum_of_its_parts_whatever_the_prompt_names(folder: Path, parity: Any) -> None:
    judge, prompts = reward(folder), ["a fox", "a <|VQ_reward|> of {gold}, <|TA_reward|> <|MQ_reward|>"]
    measured = measure_images(judge, video().expand(2, -1, -1, -1, -1), prompts)
    parts = [measured.info[name] for name in ("visual_quality", "motion_quality", "text_alignment")]
    assert torch.allclose(torch.stack(parts).sum(0), measured.scores, atol=1e-5)
    assert parts[0][0] == pytest.approx(float(parts[0][1]), abs=1e-4), "the quality is read before the prompt"
    assert abs(parts[2][0] - parts[2][1]) > 1e-3


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        (17, 24, [0, 5, 11, 16]),  # four at least
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (3, 8, [0, 2]),
        (2, 8, [0, 1]),
    ],
)
def test_frames_are_spread_over_the_video(total: int, fps: float, expected: list[int]) -> None:
    assert frames_seen(total, fps, rate=2.0) == expected


def test_other_files_and_a_still_image_are_refused(folder: Path, parity: Any, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="expected videos of 2 frames or more, got 1"):
        frames_seen(1, 8, 2.0)
    (tmp_path / "checkpoint-11352").mkdir()
    weights = torch.load(folder / "published" / "checkpoint-11352" / "model.pth", weights_only=True)
    settings = json.loads((folder / "published" / "model_config.json").read_text())
    (tmp_path / "model_config.json").write_text(json.dumps(settings))
    head = weights.pop("base_model.model.rm_head.weight")
    torch.save(weights, tmp_path / "checkpoint-11352" / "model.pth")
    with pytest.raises(RewardError, match=r"1 weights missing \(rm_head.weight\)"):
        reward(folder, tmp_path)
    torch.save(weights | {"base_model.model.rm_head.weight": head}, tmp_path / "checkpoint-11352" / "model.pth")
    del settings["inference_config"]["TA_std"]
    (tmp_path / "model_config.json").write_text(json.dumps(settings))
    with pytest.raises(RewardError, match=r"which lacks inference_config.TA_std; it is another file"):
        reward(folder, tmp_path)


def test_a_head_may_have_a_row_for_every_score(folder: Path, parity: Any, tmp_path: Path) -> None:
    weights = torch.load(folder / "published" / "checkpoint-11352" / "model.pth", weights_only=True)
    name = "base_model.model.rm_head.weight"
    weights[name] = weights[name] * torch.tensor([[1.0], [2.0], [3.0]])
    (tmp_path / "checkpoint-11352").mkdir()
    torch.save(weights, tmp_path / "checkpoint-11352" / "model.pth")
    (tmp_path / "model_config.json").write_text((folder / "published" / "model_config.json").read_text())
    judges = reward(folder), reward(folder, tmp_path)
    one, three = (measure_images(judge, video(), ["a fox"]).info for judge in judges)
    norms = {"visual_quality": (3.5, 2), "motion_quality": (1, 1.5), "text_alignment": (3, 2.5)}
    for times, (name, (mean, std)) in enumerate(norms.items(), 1):
        expected = (times * (float(one[name]) * std + mean) - mean) / std
        assert float(three[name]) == pytest.approx(expected, abs=1e-4)


def test_the_memory_that_is_planned() -> None:
    held = reward_memory("videoreward", 1, torch.float16)
    assert held is not None and held.weights / 2e9 == pytest.approx(2.21, rel=0.01) and held.scoring > 0
