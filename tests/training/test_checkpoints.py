"""Every damage a checkpoint can suffer, done to real folders; kills and full disks in real child processes."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlr_peft.training import CheckpointError, CheckpointManager, load_tensors, read_manifest

ADAPTER_NAME = "pytorch_lora_weights.safetensors"


def state_of(step: int) -> dict[str, Any]:
    return {
        "optimizer": {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.full((64,), float(step))}}},
        "statistics": {"norms": [0.5, step], "name": "running", "pair": (1, None)},
    }


def write_adapter(step: int) -> Callable[[Path], object]:
    return lambda folder: (folder / ADAPTER_NAME).write_bytes(bytes([step % 256]) * 2000)


def save(manager: CheckpointManager, step: int) -> Path:
    return manager.save(step, state_of(step), write_adapter(step), process_state={"seed": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(run: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "outputs")
    path = save(manager, 7)
    assert path == tmp_path / "outputs" / "checkpoint-7"
    assert names(tmp_path / "outputs") == ["checkpoint-7"]
    assert names(path) == ["manifest.json", "optimizer.pt", "process_states.pt", ADAPTER_NAME, "statistics.pt"]
    loaded = manager.load(path)
    assert (loaded.path, loaded.step, loaded.process_state) == (path, 7, {"seed": 7})
    assert loaded.state.keys() == {"optimizer", "statistics"}
    assert loaded.state["statistics"] == state_of(7)["statistics"]
    assert torch.equal(loaded.state["optimizer"]["state"][0]["exp_avg"], torch.full((64,), 7.0))


def test_a_checkpoint_is_found_by_latest_by_name_and_by_path(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (9, 10, 2):
        save(manager, step)
    assert manager.resolve(None) is None
    assert manager.resolve("latest") == tmp_path / "checkpoint-10"
    assert manager.resolve("checkpoint-9") == tmp_path / "checkpoint-9"
    assert CheckpointManager(tmp_path / "other").resolve(str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"


def test_latest_without_any_checkpoint_starts_from_scratch_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert CheckpointManager(tmp_path / "absent").resolve("latest") is None
    assert "absent: starting from scratch" in caplog.text


def test_a_missing_name_is_an_error_that_lists_what_there_is(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 3)
    with pytest.raises(CheckpointError, match=r"No checkpoint 'checkpoint-4'.*There are: checkpoint-3"):
        manager.resolve("checkpoint-4")


def truncate(path: Path) -> None:
    os.truncate(path / "optimizer.pt", 100)


def delete(path: Path) -> None:
    (path / ADAPTER_NAME).unlink()


def flip_a_byte(path: Path) -> None:
    content = bytearray((path / ADAPTER_NAME).read_bytes())
    content[1000] ^= 1
    (path / ADAPTER_NAME).write_bytes(content)


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def truncate_the_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 200)


def change_the_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 2', '"step": 3'))


def name_a_file_outside(path: Path) -> None:
    """With its own sum right, as only somebody who means it writes it."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    manifest["files"]["../../secret.pt"] = {"size": 3, "sha256": "0"}
    manifest["manifest_sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def empty_everything(path: Path) -> None:
    for file in path.iterdir():
        os.truncate(file, 0)


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "optimizer.pt has 100 bytes instead of",
    delete: f"{ADAPTER_NAME} is missing",
    flip_a_byte: f"{ADAPTER_NAME} is damaged",
    lose_the_manifest: "it has no manifest.json",
    truncate_the_manifest: "its manifest.json is damaged",
    change_the_manifest: "its manifest.json is damaged",
    empty_everything: "its manifest.json is damaged",
    name_a_file_outside: "its manifest.json names '../../secret.pt', which is not a file in its folder",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_passes_over_a_damaged_checkpoint_and_a_named_one_is_an_error(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    damage(save(manager, 2))
    with caplog.at_level(logging.WARNING):
        assert manager.resolve("latest") == tmp_path / "checkpoint-1"
    assert f"Passing over {tmp_path / 'checkpoint-2'}: {DAMAGES[damage]}" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2 cannot be used: "):
        manager.resolve("checkpoint-2")
    # going on repairs it: the same step is written anew
    save(manager, 2)
    assert manager.resolve("latest") == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_tensor_files_that_are_no_archive_or_part_of_one_on_several_disks_hold_no_tensors(tmp_path: Path) -> None:
    """The second with the end record of ZIP64 archives that span disks, at which Python's own check raises."""
    spanning = b"PK\x06\x07" + struct.pack("<LQL", 1, 0, 2) + b"PK\x05\x06" + bytes(18)
    for content in (b"", b"nothing", spanning):
        (tmp_path / "optimizer.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"optimizer\.pt holds no tensors"):
            load_tensors(tmp_path / "optimizer.pt")


def test_other_versions_of_the_format_and_of_packages_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path)
    monkeypatch.setattr("rlr_peft.training.checkpoints.FORMAT_VERSION", 99)
    save(manager, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format version is 99, this program reads 9"):
        manager.resolve("checkpoint-1")
    monkeypatch.setattr("rlr_peft.build.machine.version", lambda package: "0.1")
    path = save(manager, 2)
    monkeypatch.undo()
    manager.load(path)
    assert f"torch 0.1 -> {torch.__version__}" in caplog.text


def test_a_half_written_folder_is_not_a_checkpoint_and_goes_away_with_the_next_save(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    for leftover in (f".checkpoint-2.tmp-{os.getpid()}", ".checkpoint-2.tmp-1"):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / leftover)
    assert manager.resolve("latest") == tmp_path / "checkpoint-1"
    save(manager, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, total_limit=1)
    save(manager, 5)
    (tmp_path / "checkpoint-5").rename(tmp_path / ".checkpoint-5.replaced-1")
    path = manager.resolve("latest")
    assert path is not None
    assert manager.load(path).step == 5
    save(manager, 5)
    assert names(tmp_path) == ["checkpoint-5"]


def test_the_limit_deletes_the_oldest_complete_ones_after_the_new_one_is_there(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, total_limit=2)
    for step in (8, 9, 10):
        save(manager, step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    delete(tmp_path / "checkpoint-10")
    save(manager, 11)  # a damaged one does not push a complete one out
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    (tmp_path / "checkpoint-notes").mkdir()
    save(manager, 12)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11", "checkpoint-12", "checkpoint-notes"]


def test_a_state_that_cannot_be_read_back_safely_is_refused_when_saved(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, total_limit=1)
    save(manager, 1)
    with pytest.raises(CheckpointError, match=r"(?s)checkpoint-2.*weights_only.*earlier checkpoints are untouched"):
        manager.save(2, {"odd": Path("x")}, write_adapter(2))
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_full_disk_is_an_error_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, total_limit=1)
    save(manager, 1)

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # then writing fails as on a full disk
        big = {"optimizer": torch.zeros(100_000)}
        try:
            manager.save(2, big, write_adapter(2))
        except CheckpointError as error:
            os._exit(42 if "earlier checkpoints are untouched" in str(error) else 1)

    process = in_child(run)
    process.join()
    assert process.exitcode == 42
    assert names(tmp_path) == ["checkpoint-1"]
    assert manager.resolve("latest") == tmp_path / "checkpoint-1"


def test_whenever_a_saving_process_is_killed_the_latest_checkpoint_is_complete(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, total_limit=2)
    save(manager, 1)
    started = time.monotonic()
    save(manager, 2)
    one_save = time.monotonic() - started
    rounds, newest = 12, 2
    for index in itertools.count():
        if index >= rounds and newest > 2:  # on a busy machine a child needs longer for its first save
            break

        def run(first: int = newest) -> None:
            for step in range(first, first + 1000):  # the first save replaces a folder that is already there
                save(manager, step)

        process = in_child(run)
        time.sleep(0.01 + one_save * (1 + 4 * index / rounds))
        assert process.is_alive()
        process.kill()
        process.join()
        path = manager.resolve("latest")
        assert path is not None
        loaded = manager.load(path)
        assert loaded.step >= newest
        assert loaded.state["optimizer"]["state"][0]["exp_avg"][0] == loaded.step
        assert (path / ADAPTER_NAME).read_bytes() == bytes([loaded.step % 256]) * 2000
        for folder in tmp_path.glob("checkpoint-*"):
            read_manifest(folder)  # nothing unfinished ever carries a checkpoint's name
        newest = loaded.step


Change = Callable[[dict[str, Any]], object]
CRAFTED: dict[str, tuple[Change, str]] = {
    "traversal": (lambda m: m["files"].update({"../secret.pt": m["files"][ADAPTER_NAME]}), "not a file in its folder"),
    "absolute": (lambda m: m["files"].update({"/etc/hostname": m["files"][ADAPTER_NAME]}), "not a file in its folder"),
    "list of files": (lambda m: m.update(files=[ADAPTER_NAME]), "its files is odd"),
    "list as entry": (lambda m: m["files"].update({ADAPTER_NAME: [1, 2]}), "entry 'pytorch_lora_weights.safetensors'"),
    "negative size": (lambda m: m["files"][ADAPTER_NAME].update(size=-1), "entry 'pytorch_lora_weights.safetensors'"),
    "huge step": (lambda m: m.update(step=10**400), "its step is odd"),
    "step in words": (lambda m: m.update(step="2"), "its step is odd"),
    "no processes": (lambda m: m.update(num_processes=0), "its num_processes is odd"),
    "no packages": (lambda m: m.pop("packages"), "its packages is odd"),
    "huge version": (lambda m: m.update(format_version=10**400), "its format version is 1000"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_manifest_is_one_sentence(kind: str, tmp_path: Path) -> None:
    """With a sum that is right: no accident."""
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    path = save(manager, 2) / "manifest.json"
    change, message = CRAFTED[kind]
    contents = json.loads(path.read_text())
    del contents["manifest_sha256"]
    change(contents)
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(contents | {"manifest_sha256": digest}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        manager.resolve("checkpoint-2")
    assert manager.resolve("latest") == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("text", ["[1, 2]", "[" * 100_000, "9" * 6000, '"', "{}", "null"])
def test_a_manifest_of_anything_else_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = save(CheckpointManager(tmp_path), 2) / "manifest.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"its manifest\.json is damaged"):
        CheckpointManager(tmp_path).resolve("checkpoint-2")


def test_a_manifest_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    path = save(CheckpointManager(tmp_path), 2) / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"it has no manifest\.json"):
        CheckpointManager(tmp_path).resolve("checkpoint-2")


def test_every_process_gets_its_own_state_back_and_those_that_are_new_get_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = []
    for index in (1, 0):
        manager = CheckpointManager(
            tmp_path, num_processes=2, process_index=index, gather=lambda own: [{"seed": 10}, {"seed": 11}]
        )
        manager.save(4, state_of(4), write_adapter(4), process_state={"seed": 10 + index})
        written.append(names(tmp_path))
    assert written == [[], ["checkpoint-4"]]
    for index in (0, 1):
        manager = CheckpointManager(tmp_path, num_processes=2, process_index=index)
        path = manager.resolve("latest")
        assert path is not None
        assert manager.load(path).process_state == {"seed": 10 + index}
    assert "processes" not in caplog.text
    for number, expected in ((1, [{"seed": 10}]), (3, [{"seed": 10}, {"seed": 11}, None])):
        managers = [CheckpointManager(tmp_path, num_processes=number, process_index=index) for index in range(number)]
        assert [manager.load(path).process_state for manager in managers] == expected
        assert f"written by 2 processes and this run has {number}: its updates are those of then" in caplog.text


def test_the_manifest_tells_who_wrote_what(tmp_path: Path) -> None:
    manifest = json.loads((save(CheckpointManager(tmp_path), 6) / "manifest.json").read_text())
    assert manifest["step"] == 6
    assert manifest["num_processes"] == 1
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["files"][ADAPTER_NAME]["size"] == 2000


def test_latest_does_not_start_from_scratch_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    """Days of work may be there, of another version for example: the user must decide."""
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        lose_the_manifest(save(manager, step))
    with pytest.raises(CheckpointError, match=r"None of the 2 checkpoints in .* can be used"):
        manager.resolve("latest")
