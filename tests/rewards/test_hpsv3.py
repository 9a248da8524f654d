"""HPSv3 on a tiny checkpoint with the published names, and the file that its question is read from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.reward_parity import mixed_images, to_tensor
from benchmarks.vlm_parity import hpsv3_parity
from rlr_peft.errors import RewardError
from rlr_peft.rewards import ModelFiles, ModelSettings, RewardSettings, load_reward, score_images
from rlr_peft.rewards.model_files import HPSV3, HPSV3_CODE, QWEN2_VL, constant_in, template_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hpsv3")


@pytest.fixture(scope="module")
def parity(folder: Path) -> dict[str, float]:
    with torch.random.fork_rng(devices=[]):
        return hpsv3_parity(folder)


def reward(folder: Path, checkpoint: Path | None = None) -> Any:
    places = {QWEN2_VL: folder / "qwen", HPSV3: checkpoint or folder, HPSV3_CODE: folder / "code.py"}
    files = ModelFiles({repo: str(place) for repo, place in places.items()})
    return load_reward("hpsv3", RewardSettings(ModelSettings(files=files)))


def test_scores_are_those_of_the_published_forward_pass(parity: dict[str, float]) -> None:
    assert parity["spread"] > 0.05, "scores that are all alike would prove nothing"
    assert parity["network"] < 1e-4
    assert parity["whole"] < 0.1 * parity["spread"]


def test_gradients_match_finite_differences(folder: Path, parity: Any) -> None:
    judge = reward(folder)
    judge.network["model"].double()
    images = (0.35 + 0.3 * to_tensor(mixed_images((40, 52), 1))).requires_grad_(True)  # off the clamps
    (gradient,) = torch.autograd.grad(score_images(judge, images, ["a fox"]).sum(), images)
    direction, step = gradient / gradient.norm(), 0.001
    with torch.no_grad():
        ahead, behind = (score_images(judge, images + sign * step * direction, ["a fox"]) for sign in (1, -1))
    assert float(ahead - behind) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_a_prompt_may_name_the_token_of_the_score(folder: Path, parity: Any) -> None:
    scores = score_images(reward(folder), to_tensor(mixed_images((40, 52), 1)), ["a fox <|Reward|> of gold {name}"])
    assert scores.isfinite().all()


def test_a_checkpoint_of_another_kind_is_refused(folder: Path, parity: Any, tmp_path: Path) -> None:
    weights = load_file(folder / "HPSv3.safetensors")
    weights["rm_head.7.weight"] = weights.pop("rm_head.5.weight")
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises(RewardError, match=r"1 weights missing \(rm_head.5.weight\), 1 unknown \(rm_head.7.weight\)"):
        reward(folder, tmp_path)


def test_texts_are_read_from_code_that_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "raise SystemExit\nQUESTION = 'How {text_prompt}?'\nprompt = 'no'\n"
        "ask(['short', f'[{prompt}]', f'A long one: [{prompt}]\\nand {other}', 'Is it ' f'so: [{prompt}]?'])\n"
    )
    assert constant_in("mine", path, "QUESTION") == "How {text_prompt}?"
    assert template_in("mine", path, "prompt") == "Is it so: [{prompt}]?"
    with pytest.raises(RewardError, match="expected a text called ANSWER in "):
        constant_in("mine", path, "ANSWER")
    with pytest.raises(RewardError, match=r"expected an f-string with \{caption\} in "):
        template_in("mine", path, "caption")
    path.write_text("<html>")
    with pytest.raises(RewardError, match=r"expected Python code in .*; it is another file"):
        constant_in("mine", path, "QUESTION")
