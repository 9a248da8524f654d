"""Checkpoints in the background: what fails here is told at the end and never raised into training."""

import shutil
from pathlib import Path

from huggingface_hub import HfApi

from rlr_peft.files import WEIGHT_NAME
from rlr_peft.publishing import Destination, Publisher

OFFLINE = Destination(HfApi(token=False), "owner/name", "main")  # HF_HUB_OFFLINE is set in tests


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / WEIGHT_NAME).write_bytes(b"weights")
    return folder


def test_what_cannot_be_copied_or_sent_is_told_at_the_end(tmp_path: Path) -> None:
    left = tmp_path / ".checkpoint-1.push-killed"
    left.mkdir()
    publisher = Publisher(OFFLINE)
    first = checkpoint(tmp_path / "checkpoint-2")
    publisher.push_checkpoint(first)
    shutil.rmtree(first)  # as `checkpoints_total_limit` does
    publisher.push_checkpoint(tmp_path / "gone" / "checkpoint-3")
    publisher.push_checkpoint(tmp_path / "checkpoint-4")  # deleted before its turn
    failures = publisher.failures()
    assert list(failures) == [first, tmp_path / "gone" / "checkpoint-3", tmp_path / "checkpoint-4"]
    assert f"a folder without {WEIGHT_NAME}" in str(failures[tmp_path / "checkpoint-4"])
    assert "offline mode is on" in str(failures[first])
    assert "FileNotFoundError" in str(failures[tmp_path / "gone" / "checkpoint-3"])
    publisher.stop()
    assert not list(tmp_path.glob(".checkpoint-*")) and not left.exists()
