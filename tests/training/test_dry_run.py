"""A dry run does everything but train, and leaves nothing."""

import re
from pathlib import Path

import pytest

from rlr_peft.config import load_config
from rlr_peft.prompt import PromptError
from rlr_peft.reports import duration
from rlr_peft.training import Seconds, take_dry_run
from tests.training.runs import config_file, run_script


def test_a_dry_run_says_what_the_run_takes_and_leaves_nothing(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"evaluation_prompt_path": str(workplace / "unseen.txt"), "max_train_steps": 30, "dcot_rules": True}
    config = config_file(workplace, tmp_path / "out", **values)
    before = sorted(tmp_path.rglob("*"))
    shown = ["--validation_prompt", "a cat", "--validation_steps", "10"]
    run_script(monkeypatch, config, "--dry_run", "--num_inference_steps", "20", *shown)
    text = capsys.readouterr().out
    assert re.search(r"Memory: [\d.]+ of [\d.]+ GiB used.*\n    planned for the whole run: [\d.]+ GiB", text)
    assert re.search(r"Update: the first [\d.]+ s, then [\d.]+ s each, for 4 samples on \d+ CPU cores", text)
    assert re.search(r"Whole run: about .* for 30 updates", text)
    assert re.search(r"base and adapter on 12 images each: .* s\n", text) and "validation images: " in text
    assert "  Chain-of-Thought as a contrast, for example:\n    red ball -> the whole prompt in every stage\n" in text
    assert re.search(r"share of evaluations: \d+%\n  Every sample .* in 20 steps.*\n  Chain-of", text)
    assert "try --num_inference_steps 10 --evaluation_steps 20.\n" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_the_whole_run_is_its_parts() -> None:
    seconds = Seconds(first=20, update=4, calibration=30, evaluation=60, validation=10, updates=21)
    assert seconds.total == 20 + 20 * 4 + 30 + 60 + 10
    assert seconds.evaluation_share == pytest.approx(70 / 200)


def test_times_are_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.25, 9.96, 59.6, 200, 3599.6, 7_500, 360_000)] == [
        *("0.2 s", "10 s", "1 min 0 s", "3 min 20 s", "1 h 00 min", "2 h 05 min", "100 h 00 min")
    ]


def test_what_cannot_be_read_is_refused_before_the_memory_is_planned(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a cat\x00")
    config = config_file(workplace, tmp_path / "out", prompt_path=str(tmp_path / "bad.txt"), max_train_steps=2)
    with pytest.raises(PromptError, match=r"bad\.txt"):
        take_dry_run(load_config(["--config", str(config)]))
    assert "Planning memory" not in capsys.readouterr().err
