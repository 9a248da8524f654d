import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy
import pytest
import torch

from rlr_peft.training import MetricsLog, read_metrics


def write_steps(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.log({"reward": math.sin(step) / 3, "terms": {"fo": 1e-9 * step}}, step)


def test_lines_are_read_back_exactly_with_tensors_and_numpy_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log({"reward": torch.tensor(0.1), "n": numpy.int64(3), "name": "é", "list": [0.1, numpy.float32(2)]}, 1)
    assert read_metrics(path) == [
        {"step": 1, "reward": torch.tensor(0.1).item(), "n": 3, "name": "é", "list": [0.1, 2.0]}
    ]
    assert json.loads(path.read_text().splitlines()[0])["step"] == 1


def test_every_line_is_in_the_file_at_once_and_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def run() -> None:
        log = MetricsLog(path)
        write_steps(log, 1, 5)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("tail", ["", '{"step": 8, "rew', '{"step": 8}', "\udcff"])
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path: Path, tail: str) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    with MetricsLog(whole) as log:
        write_steps(log, 1, 10)
    with MetricsLog(resumed) as log:
        write_steps(log, 1, 7)
    with resumed.open("a", errors="surrogateescape") as file:
        file.write(tail)
    with MetricsLog(resumed, resume_step=4) as log:
        write_steps(log, 5, 10)
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.jsonl", "whole.jsonl"]


def test_a_new_run_starts_a_new_file_and_resuming_without_one_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for resume_step in (3, None):
        with MetricsLog(path, resume_step=resume_step) as log:
            write_steps(log, 4, 5)
        assert [line["step"] for line in read_metrics(path)] == [4, 5]


@pytest.mark.parametrize("what", ["file", "folder", "replaced"])
def test_a_file_that_is_removed_while_it_is_written_comes_back_whole(tmp_path: Path, what: str) -> None:
    path, whole = tmp_path / "logs" / "metrics.jsonl", tmp_path / "whole.jsonl"
    with MetricsLog(path) as log, MetricsLog(whole) as expected:
        write_steps(log, 1, 3)
        if what == "folder":
            shutil.rmtree(path.parent)
        else:
            path.unlink()
        if what == "replaced":
            path.write_text("somebody's own\n")
        write_steps(log, 4, 5)
        log.synchronize()
        write_steps(log, 6, 6)
        write_steps(expected, 1, 6)
        assert path.read_bytes() == whole.read_bytes()
    others = {"metrics.jsonl.replaced"} if what == "replaced" else set()
    assert {file.name for file in path.parent.iterdir()} == {"metrics.jsonl", *others}


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(-math.inf), {"fo": [1.0, math.nan]}])
def test_numbers_that_are_not_finite_are_an_error_and_leave_no_line(tmp_path: Path, value: object) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log({"loss": 1.0}, 1)
        with pytest.raises(ValueError, match=r"metric 'loss.*' of step 2 is .*expected a finite number"):
            log.log({"loss": value}, 2)
    assert len(read_metrics(path)) == 1


def test_a_damaged_line_in_the_middle_is_reported_and_the_file_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        MetricsLog(path, resume_step=3)
    assert path.read_text().startswith('{"step": 1}\n{"st\n')
