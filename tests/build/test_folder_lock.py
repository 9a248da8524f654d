"""Who may write into an output folder: real processes, killed for real."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rlr_peft.build import FolderInUseError, Owner, folder_lock, only_writer, this_process
from rlr_peft.build.folder_lock import LOCK, OWNER, PATIENCE
from rlr_peft.cli import main
from rlr_peft.publishing import Base, Rewards, RunRecord, StoredCard, write_card
from tests.programs import Program
from tests.training.runs import config_file, finish, start

HOLD = """
import sys, time
from pathlib import Path
from rlr_peft.build.folder_lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holding(folder: Path) -> Iterator[Program]:
    """Another process that writes into the folder."""
    process = Program(["-c", HOLD, folder])
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def leave_owner(folder: Path, owner: Owner, seconds_ago: float = 0) -> None:
    """The file of an owner that did not come to remove it."""
    folder.mkdir(exist_ok=True)
    (folder / OWNER).write_text(json.dumps(asdict(owner)))
    os.utime(folder / OWNER, (time.time() - seconds_ago,) * 2)


def test_a_second_writer_is_told_of_the_first_until_that_is_killed(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with holding(out) as first:
        said = f"got {out}, to which process {first.pid} on {this_process().host} (started "
        with pytest.raises(FolderInUseError) as refused, only_writer(out):
            pass
        assert said in str(refused.value)
        assert said in finish(start(config_file(workplace, out)), expected_code=2), "before any model is loaded"
        (out / ".writing-1").mkdir()
        first.send_signal(signal.SIGKILL)
        first.wait()
        with only_writer(out):
            assert (
                f"process {first.pid} on" in caplog.text and "(it was killed?): this run takes it over" in caplog.text
            )
            assert not (out / ".writing-1").exists()
    assert not (out / OWNER).exists()


def test_a_run_in_a_folder_inside_keeps_what_it_is_writing(tmp_path: Path) -> None:
    writing, left = tmp_path / "inner" / "images" / ".writing-1", tmp_path / "earlier-run-1" / ".writing-2"
    left.mkdir(parents=True)
    with only_writer(tmp_path / "inner"):
        writing.mkdir(parents=True)
        with only_writer(tmp_path):
            assert writing.is_dir() and not left.exists()


def test_only_the_main_process_takes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_writer(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with only_writer(tmp_path / "out"):
            pass
        assert (tmp_path / "out" / OWNER).exists()


def test_an_owner_on_another_machine_counts_as_alive_until_it_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(this_process(), host="elsewhere", boot="other")
    leave_owner(tmp_path, other, seconds_ago=PATIENCE / 2)
    with pytest.raises(
        FolderInUseError, match=r"on elsewhere .*last sign of life is 9\d s old.* or remove .*run\.json"
    ):
        only_writer(tmp_path).__enter__()
    leave_owner(tmp_path, other, seconds_ago=PATIENCE + 5)
    with only_writer(tmp_path):
        assert "on elsewhere" in caplog.text and "takes it over" in caplog.text


def test_without_file_locks_the_owners_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", missing)
    alive = this_process()
    leave_owner(tmp_path, alive)
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
        only_writer(tmp_path).__enter__()
    leave_owner(tmp_path, replace(alive, started=alive.started - 100))  # the same number, another process
    with only_writer(tmp_path):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave_owner(tmp_path, replace(alive, process=ended.pid))
    with only_writer(tmp_path):
        pass


def test_a_folder_that_is_made_again_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT", 0.05)
    out = tmp_path / "out"
    with only_writer(out):
        shutil.rmtree(out)
        out.mkdir()  # as the next checkpoint does
        deadline = time.monotonic() + 10
        while not (out / OWNER).exists() or not (out / LOCK).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(FolderInUseError):
            only_writer(out).__enter__()


def test_a_start_that_writes_nothing_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    with only_writer(tmp_path / "outputs" / "compare"):
        assert (tmp_path / "outputs" / "compare" / OWNER).exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "outputs").mkdir()
    with only_writer(tmp_path / "outputs" / "compare"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "outputs"], "that was there before"


def test_the_card_is_not_written_while_a_run_writes_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_card(tmp_path, StoredCard(RunRecord(Base("base"), Rewards("aesthetic"), {})))
    with only_writer(tmp_path), pytest.raises(SystemExit) as left:
        main(["card", str(tmp_path)])
    assert left.value.code == 2 and "to which process" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"host": 1}', "x" * 100])
def test_a_damaged_owner_file_hinders_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / OWNER).write_text(text)
    with only_writer(tmp_path):
        assert folder_lock._owner(tmp_path) == this_process()
