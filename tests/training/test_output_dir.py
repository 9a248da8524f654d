"""The output folder of an earlier run: nothing is lost, and nothing passes for the new run's."""

from pathlib import Path

import pytest

from rlr_peft.training import CheckpointManager, claim_output_dir

FINISHED = ("README.md", "config.yaml", "metrics.jsonl", "pytorch_lora_weights.safetensors", "images/base_0.png")


def leave_run(folder: Path, *steps: int) -> None:
    """What a run leaves."""
    for step in steps:
        CheckpointManager(folder).save(step, {"from": folder.name}, lambda aside: (aside / "adapter").touch())
    for name in FINISHED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_start_from_scratch_moves_all_of_an_earlier_run_and_no_file_of_the_user(tmp_path: Path) -> None:
    assert claim_output_dir(tmp_path, None, 0, is_latest=False) is None
    leave_run(tmp_path, 9)
    (tmp_path / "stage_prompts.jsonl").touch()
    before = files(tmp_path)
    aside = claim_output_dir(tmp_path, None, 0, is_latest=False)
    assert aside == tmp_path / "earlier-run-1"
    assert files(aside) == before - {"stage_prompts.jsonl"}
    assert files(tmp_path) - {f"earlier-run-1/{name}" for name in files(aside)} == {"stage_prompts.jsonl"}
    manager = CheckpointManager(tmp_path)
    assert manager.resolve("latest") is None
    assert manager.resolve("earlier-run-1/checkpoint-9") is not None
    leave_run(tmp_path, 3)
    assert claim_output_dir(tmp_path, None, 0, is_latest=False) == tmp_path / "earlier-run-2"


def test_a_start_that_saved_nothing_leaves_no_folder_behind(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "validation/step-000000.png", "logs/events", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert claim_output_dir(tmp_path, None, 0, is_latest=True) is None
    assert files(tmp_path) == {"logs/events", "notes.txt"}


def test_going_on_from_the_latest_checkpoint_moves_nothing(tmp_path: Path) -> None:
    leave_run(tmp_path, 1, 2)
    before = files(tmp_path)
    assert claim_output_dir(tmp_path, tmp_path / "checkpoint-2", 2, is_latest=True) is None
    assert files(tmp_path) == before


def test_going_on_from_an_older_checkpoint_moves_the_later_ones_and_copies_what_belongs_to_both(tmp_path: Path) -> None:
    """Else `latest` would mean the abandoned course after the next interruption."""
    leave_run(tmp_path, 1, 2, 3)
    aside = claim_output_dir(tmp_path, tmp_path / "checkpoint-1", 1, is_latest=False)
    assert aside is not None
    assert {path.name for path in aside.iterdir()} == {"checkpoint-2", "checkpoint-3", "images", *FINISHED[:4]}
    assert CheckpointManager(tmp_path).resolve("latest") == tmp_path / "checkpoint-1"
    kept = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert kept == {"config.yaml", "metrics.jsonl"}, "the adapter and card of the abandoned course are not this one's"


@pytest.mark.parametrize("has_curve", [True, False])
def test_going_on_from_another_run_takes_its_curve_and_moves_what_was_there(tmp_path: Path, has_curve: bool) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    leave_run(source, 5)
    leave_run(folder, 2, 9)
    if not has_curve:
        (source / "metrics.jsonl").unlink()
    before = files(source)
    assert claim_output_dir(folder, source / "checkpoint-5", 5, is_latest=False) == folder / "earlier-run-1"
    assert files(source) == before, "the other run is only read"
    assert (folder / "earlier-run-1" / "metrics.jsonl").read_text() == "folder metrics.jsonl"
    left = {path.name for path in folder.iterdir()}
    assert left == {"earlier-run-1", "images"} | ({"metrics.jsonl"} if has_curve else set())
    assert not has_curve or (folder / "metrics.jsonl").read_text() == "source metrics.jsonl"
