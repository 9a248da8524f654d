"""Resuming in every way but the ordinary one: elsewhere, from an older step, after the end, with another config."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlr_peft.config import ConfigError
from rlr_peft.rewards import JpegReward, RewardServer, score_images
from rlr_peft.training import CheckpointError, MetricsError, evaluate_base, finish, read_metrics, resume, write_manifest
from tests.programs import serving
from tests.training.runs import WEIGHTS, build, config_file, train_here

FAST = {"estimator": "full-bp", "checkpointing_steps": 1}


def test_an_older_checkpoint_starts_another_course_and_latest_means_that_one(workplace: Path, tmp_path: Path) -> None:
    config = config_file(workplace, tmp_path / "out", max_train_steps=3, **FAST)
    train_here(config)
    train_here(config, "--resume_from_checkpoint", "checkpoint-1", "--max_train_steps", "2", "--learning_rate", "0.1")
    run = build(config, "--resume_from_checkpoint", "latest")
    assert resume(run).step == 2, "not the first course's checkpoint-3"
    assert [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 2]
    assert [line["lr"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [0.01, 0.1]
    aside = tmp_path / "out" / "earlier-run-1"
    assert [line["step"] for line in read_metrics(aside / "metrics.jsonl")] == [1, 2, 3]
    assert (aside / "checkpoint-3" / WEIGHTS).is_file()


def test_after_the_last_step_in_another_folder_it_finishes(workplace: Path, tmp_path: Path) -> None:
    config = config_file(workplace, tmp_path / "out", max_train_steps=1, **FAST)
    train_here(config)
    flags = ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    for name in ("with curve", "without curve"):
        run, progress = train_here(config, *flags, "--output_dir", str(tmp_path / name))
        finish(run, progress, before=None)
        assert (tmp_path / name / WEIGHTS).read_bytes() == (tmp_path / "out" / "checkpoint-1" / WEIGHTS).read_bytes()
        assert (tmp_path / name / "reward_curve.png").is_file() == (name == "with curve")
        assert ("reward_curve.png" in (tmp_path / name / "README.md").read_text()) == (name == "with curve")
        (tmp_path / "out" / "metrics.jsonl").unlink(missing_ok=True)


def test_a_heldout_reward_may_come_later(workplace: Path, tmp_path: Path) -> None:
    config = config_file(workplace, tmp_path / "out", max_train_steps=1, **FAST)
    train_here(config)
    heldout = ["--heldout_reward_fn", "jpeg-compressibility"]
    run, progress = train_here(config, "--resume_from_checkpoint", "latest", "--max_train_steps", "2", *heldout)
    finish(run, progress, before=None)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 2
    assert (tmp_path / "out" / "reward_curve.png").is_file()


def test_a_reward_server_that_changed_in_between_is_noticed(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(RewardServer(JpegReward(compressible=True), "127.0.0.1", 0, version="v1")) as server:
        config = config_file(
            workplace,
            tmp_path / "out",
            reward_fn=server.url,
            estimator="reinforce",
            checkpointing_steps=1,
            max_train_steps=1,
        )
        train_here(config)
        for version, messages in (("v1", 0), ("v2", 1)):
            server.stated["version"] = version
            run = build(config, "--resume_from_checkpoint", "latest")
            resume(run)
            score_images(run.reward, torch.rand(1, 3, 8, 8), ["a cat"])
            told = [message for message in caplog.messages if "it is of version v2 now and was of v1" in message]
            assert len(told) == messages


OTHERS = {
    "estimator": (["--estimator", "full-bp"], "of estimator full-bp, got .*checkpoint-1, which is of estimator rlr"),
    "reward": (
        ["--reward_fn", "jpeg-compressibility"],
        "of reward_fn jpeg-compressibility, got .*, which is of reward_fn rewards.py:redness. .*--init_adapter",
    ),
    "steps": (["--num_inference_steps", "5"], "of num_inference_steps 5, got .* of num_inference_steps 4"),
    "rank": (["--rank", "2"], r"that of this config, got another: rank 2 here, 4 there\. Resume with"),
    "targets": (
        ["--lora_layers", "to_k"],
        r"got another: \d+ of its \d+ weights, the first .*to_.*, are not in this run",
    ),
    "DoRA": (["--use_dora"], r"\d+ of \d+ weights, the first .*lora_magnitude_vector.*, are not in the checkpoint"),
}


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run of one update, whose K was not measured."""
    config = config_file(workplace, tmp_path_factory.mktemp("finished") / "out", max_train_steps=1, fo_steps=1)
    train_here(config)
    return config


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_another_kind_is_refused_by_name(finished: Path, kind: str) -> None:
    flags, message = OTHERS[kind]
    run = build(finished, "--resume_from_checkpoint", "latest", "--fo_steps", "null", *flags)
    with pytest.raises(CheckpointError, match=message):
        resume(run)


def test_a_k_that_is_measured_only_since_resuming_is_measured_at_once(finished: Path) -> None:
    other = str(finished.with_name("measured"))
    flags = ["--resume_from_checkpoint", str(finished.with_suffix("") / "checkpoint-1"), "--output_dir", other]
    run, _ = train_here(finished, *flags, "--max_train_steps", "2", "--fo_steps", "auto")
    assert run.estimator.is_calibrated


NOT_OURS = {
    "progress": {"seconds": "long"},
    "optimizer": [1, 2, 3],
    "estimator": {},
    "identity": None,
    "lora": ["weights"],
    "process_states": [],
    "early_stopping": {"best": 3},
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_whole_files_with_foreign_contents_are_one_sentence(finished: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(finished.with_suffix("") / "checkpoint-1", tmp_path / "checkpoint-1")
    torch.save(NOT_OURS[name], copy / f"{name}.pt")
    (copy / "manifest.json").unlink()
    write_manifest(copy, step=1, num_processes=1)
    run = build(finished, "--resume_from_checkpoint", str(copy))
    with pytest.raises(CheckpointError, match="is whole, but does not hold what this program saves"):
        resume(run)


REMOVING = """
import shutil
from pathlib import Path

calls = 0

def removing(images, prompts):
    global calls
    calls += 1
    if calls == 3:  # in the second update
        {act}
    return images.mean((1, 2, 3))
"""
REMOVE_ALL = "shutil.rmtree({out!r})"
# Neither the file nor a place for it: what cannot be mended.
BLOCK = "Path({out!r}, 'metrics.jsonl').unlink(); [Path({out!r}, n, 'x').mkdir(parents=True) for n in ({names})]"


def removing_config(workplace: Path, folder: Path, act: str, **values: object) -> Path:
    act = act.format(out=str(folder / "out"), names="'metrics.jsonl', 'metrics.jsonl.replaced'")
    (folder / "removing.py").write_text(REMOVING.replace("{act}", act))
    reward = f"{folder / 'removing.py'}:removing"
    return config_file(workplace, folder / "out", reward_fn=reward, max_train_steps=2, estimator="full-bp", **values)


def test_an_output_folder_that_is_removed_while_training_comes_back(workplace: Path, tmp_path: Path) -> None:
    config = removing_config(workplace, tmp_path, REMOVE_ALL, checkpointing_steps=2, report_to="tensorboard")
    run, progress = train_here(config)
    finish(run, progress, before=None)
    assert [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 2]
    assert {"config.yaml", "checkpoint-2", "logs", WEIGHTS} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_checkpoint_is_saved_before_metrics_that_cannot_be_written_are_complained_of(
    workplace: Path, tmp_path: Path
) -> None:
    config = removing_config(workplace, tmp_path, BLOCK, checkpointing_steps=2)
    with pytest.raises(MetricsError, match=r"metrics\.jsonl cannot be written .*checkpoint-2 is complete"):
        train_here(config)
    assert (tmp_path / "out" / "checkpoint-2" / WEIGHTS).is_file()


def test_another_optimiser_is_refused(workplace: Path, tmp_path: Path) -> None:
    config = config_file(workplace, tmp_path / "out", max_train_steps=1, **FAST)
    train_here(config)
    with pytest.raises(CheckpointError, match=r"state of AdamW8bit in .*checkpoint-1, got that of AdamW\."):
        train_here(config, "--resume_from_checkpoint", "latest", "--use_8bit_adam")


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_drawn(workplace: Path, tmp_path: Path) -> None:
    run = build(config_file(workplace, tmp_path / "out", max_train_steps=1, **FAST))
    (tmp_path / "out").touch()  # since the config was checked
    with pytest.raises(ConfigError, match=r"output_dir: expected a folder .*out \(File exists\)"):
        resume(run)


def test_evaluating_the_base_does_not_move_the_random_states(workplace: Path, tmp_path: Path) -> None:
    """Dropout draws from them: a resumed run, which is evaluated anew, would not repeat the uninterrupted one."""
    (tmp_path / "noisy.py").write_text(
        "import torch\n\ndef noisy(images, prompts):\n    return images.mean((1, 2, 3)) + torch.randn(len(images))\n"
    )
    values = {"evaluation_prompt_path": str(workplace / "unseen.txt"), "num_evaluation_images": 2, **FAST}
    run = build(config_file(workplace, tmp_path / "out", reward_fn=f"{tmp_path / 'noisy.py'}:noisy", **values))
    before = torch.get_rng_state()
    assert evaluate_base(run) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_signal_in_the_last_update_finishes_the_run(workplace: Path, tmp_path: Path) -> None:
    """Stopped as interrupted, it would have nothing left to do."""
    (tmp_path / "impatient.py").write_text(
        "import os, signal\n\ndef impatient(images, prompts):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    return images.mean((1, 2, 3))\n"
    )
    values = {"reward_fn": f"{tmp_path / 'impatient.py'}:impatient", "max_train_steps": 1, "estimator": "full-bp"}
    config = config_file(workplace, tmp_path / "out", **values)
    _, progress = train_here(config)
    assert (progress.step, progress.interrupted_by) == (1, 0)
    assert (tmp_path / "out" / "checkpoint-1" / WEIGHTS).is_file()
    _, progress = train_here(config, "--max_train_steps", "2", "--output_dir", str(tmp_path / "longer"))
    assert (progress.step, progress.interrupted_by) == (1, 143)
