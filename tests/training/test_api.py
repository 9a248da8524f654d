"""The Python API as `docs/python.md` shows it: ten lines in a notebook, and one sentence for what cannot be trained."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import rlr_peft
from rlr_peft.config import ConfigError
from rlr_peft.testing import assert_unbiased


def sharpness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean squared difference of neighbouring pixels."""
    return images.diff(dim=-1).square().mean((1, 2, 3))


def load(workplace: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(workplace / "base", dtype=torch.float32)


def documented(part: str) -> str:
    """The code of `docs/python.md` that holds these words."""
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    return next(code for code in text.split("```python\n") if part in code).split("```")[0]


def test_the_documented_lines_train_measure_and_save_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = documented("trainer.train()")
    assert lines.count("max_train_steps=20, ") == 1
    exec(lines.replace("max_train_steps=20, ", "max_train_steps=1, num_evaluation_images=2, "), {})
    assert (tmp_path / "outputs" / "sharp" / "README.md").is_file()


def test_ten_lines_train_measure_and_save(workplace: Path, tmp_path: Path) -> None:
    pipeline = load(workplace)
    config = rlr_peft.Config(
        max_train_steps=2,
        num_inference_steps=2,
        train_batch_size=2,
        num_images_per_prompt=2,
        calibration_samples=2,
        learning_rate=0.01,
        evaluation_prompt_path=str(workplace / "unseen.txt"),
        num_evaluation_images=2,
        report_to="none",
        output_dir=str(tmp_path / "run"),
    )
    trainer = rlr_peft.Trainer(pipeline, reward=sharpness, prompts=["red ball", "blue box"], config=config)
    progress = trainer.train()
    measured = trainer.evaluate()
    saved = trainer.save(tmp_path / "sharp")
    assert progress.step == 2
    assert saved["reward_gain"] == measured["reward_gain"] and saved["steps"] == 2
    fresh = load(workplace)
    fresh.load_lora_weights(tmp_path / "sharp")
    assert rlr_peft.load_lora(load(workplace), tmp_path / "sharp") > 0
    card = (tmp_path / "sharp" / "README.md").read_text()
    assert "sharpness" in card and (tmp_path / "sharp" / "metrics.json").is_file()
    first, *_ = (tmp_path / "sharp" / "config.yaml").read_text().splitlines()
    assert first.startswith("# Given as objects: pipeline (") and "prompts (a list of 2 prompts)" in first
    assert "reward (" in first and "sharpness" in first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": {"rank": 4}}, "config: expected rlr_peft.Config\\(...\\), got dict"),
        ({"reward": None}, "reward: expected an object for the Trainer, or reward_fn in the config, got neither"),
        ({"prompts": None}, "prompts: expected an object for the Trainer, or prompt_path in the config"),
        ({"pipeline": None}, "pipeline: expected an object for the Trainer, or pretrained_model_name_or_path"),
        ({}, "pipeline: expected a loaded diffusers pipeline, got object"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = rlr_peft.Config(output_dir=str(tmp_path / "run"), max_train_steps=1)
    values = {"pipeline": object(), "reward": sharpness, "prompts": ["a cat"], "config": config} | given
    with pytest.raises(ConfigError, match=message):
        rlr_peft.Trainer(**values)


def test_nothing_is_saved_before_training_and_unknown_names_are_refused(workplace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rnak"):
        rlr_peft.Config(rnak=4)
    with pytest.raises(ConfigError, match="reward_model_path: expected a mapping of names to texts"):
        rlr_peft.Config(reward_model_path={1: "a"})
    config = rlr_peft.Config(
        output_dir=str(tmp_path / "run"), max_train_steps=1, train_batch_size=2, num_images_per_prompt=2
    )
    trainer = rlr_peft.Trainer(load(workplace), reward=sharpness, prompts=["red ball"], config=config)
    with pytest.raises(ConfigError, match="expected a trained adapter, got none"):
        trainer.save()
    with pytest.raises(ConfigError, match=r"save: expected a folder or a place for one, got .*\.py is a file; choose"):
        trainer.save(__file__)
    with pytest.raises(ConfigError, match="evaluation_prompt_path or validation_split_percentage"):
        trainer.evaluate()


def test_the_package_itself_imports_no_torch() -> None:
    import subprocess
    import sys

    program = "import sys, rlr_peft; assert 'torch' not in sys.modules; rlr_peft.Segment; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert "Trainer" in dir(rlr_peft)


def test_the_documented_estimator_trains_and_is_unbiased(workplace: Path, tmp_path: Path) -> None:
    """The code of `docs/python.md`, as it stands there."""
    names: dict[str, Any] = {}
    exec(documented("class ScoreFunction"), names)
    assert_unbiased(names["ScoreFunction"](), last_std=0.2, calls=60)
    config = rlr_peft.Config(
        max_train_steps=1,
        num_inference_steps=3,
        train_batch_size=2,
        num_images_per_prompt=2,
        report_to="none",
        output_dir=str(tmp_path / "run"),
    )
    given = {"reward": sharpness, "prompts": ["red ball"], "estimator": names["ScoreFunction"]()}
    trainer = rlr_peft.Trainer(load(workplace), **given, config=config)
    assert trainer.train().step == 1
    assert '"gradient_norm/score"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    trainer.save()
    card = " ".join((tmp_path / "run" / "README.md").read_text().split())
    assert "ScoreFunction` (a score term on every step with noise) over a chain of 3" in card
    assert re.search(
        "alone does not start the run again. Given as .*: pipeline `.*base`, prompts `a list of 1 prompts`, "
        "reward `tests.training.test_api:sharpness`, estimator `.*:ScoreFunction`",
        card,
    )
