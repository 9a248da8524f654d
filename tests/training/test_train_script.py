"""The training script as users run it: real processes, real files, real signals."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from pyarrow.parquet import read_table
from safetensors.torch import load_file

from rlr_peft.training import read_metrics
from tests.training.runs import WEIGHTS, config_file, finish, run_on_two_processes, start, train_here, wait_for


def images(folder: Path, adapter: Path | None, prompts: Sequence[str]) -> torch.Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipeline(list(prompts), generator=generators, num_inference_steps=4, output_type="pt").images


def test_a_whole_run(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    many_prompts = tmp_path / "prompts.txt"
    many_prompts.write_text("".join(f"{number} red balls\n" for number in range(12)))
    config = config_file(
        workplace,
        out,
        prompt_path=str(many_prompts),
        max_train_steps=2,
        fo_roulette=False,
        report_to="tensorboard",
        skip_final_inference=False,
        validation_prompt=["red ball"],
        num_validation_images=2,
        validation_steps=1,
        evaluation_prompt_path=str(workplace / "unseen.txt"),
        heldout_reward_fn="jpeg-compressibility",
        num_evaluation_images=4,
        checkpointing_steps=1,
        checkpoints_total_limit=1,
    )
    output = finish(start(config, "--rank", "2", "--lora_alpha", "4"))
    assert "draws the same images bit for bit" in output
    assert "Warning" not in output  # of a library, which nobody could act on
    assert f"pipe.load_lora_weights({str(out)!r})" in output
    files = (
        "README.md",
        "config.yaml",
        "reward_curve.png",
        "before_after.png",
        "metrics.json",
        "compare.html",
        WEIGHTS,
    )
    for name in files:
        assert (out / name).stat().st_size > 0, name
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    drawn = [f"step-00000{i}{ending}" for i in range(3) for ending in ("", ".json", ".png")]
    assert sorted(path.name for path in (out / "validation").iterdir()) == drawn
    assert ">Finished.<" in (out / "progress.html").read_text()
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    assert yaml.safe_load((out / "config.yaml").read_text())["rank"] == 2

    metrics = json.loads((out / "metrics.json").read_text())
    for score in ("reward", "heldout"):
        assert {f"{score}_{key}" for key in ("before", "before_se", "after", "after_se", "gain", "gain_se")} <= set(
            metrics
        )
        assert metrics[f"{score}_gain"] == pytest.approx(
            metrics[f"{score}_after"] - metrics[f"{score}_before"], abs=1e-6
        )
    # One row per image: the same numbers as in the summary.
    scores = read_table(out / "scores.parquet").to_pydict()
    assert scores["model"] == ["base"] * 4 + ["adapter"] * 4 and set(scores["prompt"]) == {"a cat", "a dog"}
    redness = scores["rewards.py:redness"]
    assert sum(redness[:4]) / 4 == pytest.approx(metrics["reward_before"], abs=1e-6)
    assert sum(redness[4:]) / 4 == pytest.approx(metrics["reward_after"], abs=1e-6)
    assert sum(scores["jpeg-compressibility"][4:]) / 4 == pytest.approx(metrics["heldout_after"], abs=1e-6)
    assert f"images side by side: {out}/compare.html" in output
    page, card = (out / "compare.html").read_text(), (out / "README.md").read_text()
    assert metrics["kl"] > 0 and metrics["kl_n"] == 2
    assert "KL (nats)" in page and "Reward against KL" in page and "2 of 2 in unseen.txt" in page
    assert "| divergence from the base | " in card and "nats (KL of 2 sampled paths) |" in card
    record = json.loads((out / "run_record.json").read_text())["record"]
    assert len(record["prompts"]["shown"]) == 10  # never half a million prompts in every folder
    assert "The first 10 of its 12 training prompts:" in card

    assert metrics["n"] == 4 and metrics["seconds"] > 0 and metrics["peak_memory_mb"] > 50
    # 2 updates x 4 samples x (4 sampled + 4 differentiated steps), and the calibration's 4 x (4 + 4)
    assert metrics["denoiser_evaluations"] == 2 * 4 * 8 + 4 * 8
    log = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2]
    used = {line["first_order_steps"] for line in log}
    assert len(used) == 1 and f"K was {used.pop():g} of 4 in its updates" in (out / "README.md").read_text()

    base, adapted = images(workplace / "base", None, ["a cat"]), images(workplace / "base", out, ["a cat"])
    assert not torch.equal(base, adapted), "the adapter must do something"
    assert torch.equal(images(workplace / "base", out / "checkpoint-2", ["a cat"]), adapted)


RANDOM_BLOCKS = {
    "fo_steps": 1,
    "ho_blocks": 2,
    "ho_start": "gradient-norm",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "optimizer": "Muon",
}
MEASURED_TAIL = {"fo_steps": "auto", "calibration_interval": 3, "use_8bit_adam": True}
NO_GRADIENT = {"reward": "slow_blind_redness", "fo_steps": "auto", "calibration_interval": 2, "learning_rate": "auto"}


@pytest.mark.parametrize("estimator", [RANDOM_BLOCKS, MEASURED_TAIL, NO_GRADIENT], ids=["blocks", "measured", "blind"])
def test_killed_and_resumed_equals_uninterrupted(workplace: Path, tmp_path: Path, estimator: dict[str, object]) -> None:
    """kill -9 in the middle; with dropout, running statistics, calibrations or random blocks, and a schedule."""
    values = {
        "reward": "slow_redness",
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "lora_dropout": 0.2,
        **estimator,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = start(config_file(workplace, whole, **values))
    config = config_file(workplace, parts, **values)
    killed = start(config)
    wait_for(parts / "checkpoint-4", killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (parts / "checkpoint-6").exists()
    with (parts / "checkpoint-4" / "optimizer.pt").open("r+b") as file:  # the newest is truncated: an older one must do
        file.truncate(100)
    output = finish(start(config, "--resume_from_checkpoint", "latest", "--num_validation_images", "3"))
    assert "Resumed with another num_validation_images: 3 instead of 4." in output
    assert "Passing over" in output and "checkpoint-4" in output
    assert "Resuming from" in output and "checkpoint-2" in output
    finish(uninterrupted)
    assert (parts / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_ends(workplace: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "out"
    process = start(config_file(workplace, out, "slow_redness", max_train_steps=500, checkpointing_steps=1000))
    wait_for(out / "metrics.jsonl", process)
    process.send_signal(number)
    output = finish(process, expected_code=code)
    steps = len(read_metrics(out / "metrics.jsonl"))
    assert f"Interrupted after step {steps}" in output and "--resume_from_checkpoint latest" in output
    assert (out / f"checkpoint-{steps}" / WEIGHTS).exists()
    assert "Traceback" not in output


def test_a_bad_reward_stops_the_run_and_keeps_the_last_checkpoint(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = config_file(workplace, out, "BreaksLater", max_train_steps=9, checkpointing_steps=1, estimator="full-bp")
    output = finish(start(config), expected_code=1)
    message = output.strip().splitlines()[-1]
    assert message.startswith("error: reward 'rewards.py:BreaksLater': expected finite scores, got")
    assert 'sample 0 "' in message
    assert "Traceback" not in output
    assert (out / "checkpoint-1" / WEIGHTS).exists() and not (out / WEIGHTS).exists()


def test_a_reward_without_gradient_trains(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = {"max_train_steps": 1, "num_inference_steps": 5, "black_box_steps": 3}
    output = finish(start(config_file(workplace, out, "blind_redness", **values)))
    assert "The gradient is biased: step 1 of 5 is left out because a score term needs noise there" in output
    (line,) = read_metrics(out / "metrics.jsonl")
    assert line["first_order_steps"] == 0
    assert line["gradient_norm/black_box"] > 0 and line["gradient_norm/half_order"] > 0


@pytest.mark.parametrize("flags", [["--estimator", "full-bp"], ["--estimator", "truncated-bp", "--fo_steps", "2"]])
def test_backpropagation_without_a_gradient_is_refused(workplace: Path, tmp_path: Path, flags: list[str]) -> None:
    output = finish(start(config_file(workplace, tmp_path / "out", "blind_redness", max_train_steps=1), *flags), 1)
    assert "error: Expected a differentiable reward for " in output.strip().splitlines()[-1]


def test_mistakes_are_refused_at_once(workplace: Path, tmp_path: Path) -> None:
    config = config_file(workplace, tmp_path / "out")
    assert "did you mean" in finish(start(config, "--learning_rat", "1"), expected_code=2).lower()
    assert "nowhere.txt" in finish(start(config, "--prompt_path", "nowhere.txt"), expected_code=2)
    unknown = finish(start(config, "--lora_layers", "to_nowhere"), expected_code=2)
    assert "error: The run cannot be built: LoRA targets: got no layer for 'to_nowhere'" in unknown
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_evaluation_prompts_that_the_reward_refuses_show_before_training(workplace: Path, tmp_path: Path) -> None:
    flags = ["--reward_fn", "tiny-shapes", "--evaluation_prompt_path", str(workplace / "unseen.txt")]
    output = finish(start(config_file(workplace, tmp_path / "out"), *flags, "--num_evaluation_images", "2"), 1)
    assert "error: reward 'tiny-shapes' cannot read the prompt" in output and "Steps" not in output


def test_a_training_prompt_that_no_image_can_be_judged_by_shows_before_training(
    workplace: Path, tmp_path: Path
) -> None:
    """Somewhere in the file it would end the run after hours."""
    (tmp_path / "prompts.txt").write_text("a small red star\n" * 50 + "a cat\n")
    words = ["--heldout_reward_fn", "tiny-shapes", "--prompt_path", str(tmp_path / "prompts.txt")]
    output = finish(start(config_file(workplace, tmp_path / "out"), *words), 1)
    assert 'cannot read the prompt of sample 50 "a cat"' in output and "Steps" not in output


def test_an_error_inside_the_users_reward_shows_where(workplace: Path, tmp_path: Path) -> None:
    output = finish(start(config_file(workplace, tmp_path / "out", "mistaken")), expected_code=1)
    before, _, after = output.partition("error: reward 'rewards.py:mistaken' raised ZeroDivisionError")
    assert "Traceback" not in before and "in mistaken" in after


DRAWN_BLOCKS = {"fo_steps": 1, "ho_blocks": 2, "use_ema": True, "learning_rate": "auto"}
# From the second update on, prompts are compared with what both processes saw of them before.
PROMPT_STATISTICS = {"estimator": "ddpo", "per_prompt_stat_tracking_min_count": 4, "max_train_samples": 2}


LAGGING = {"estimator": "awm", "step_kind": "ode", "old_decay_growth": 0.2, "noise_levels": 2}
WINDOWED = {"estimator": "grpo", "step_kind": "cps", "eta": 0.8, "noise_window": [2, 4], "noise_steps": 2}


@pytest.mark.parametrize(
    "estimator", [DRAWN_BLOCKS, PROMPT_STATISTICS, LAGGING, WINDOWED], ids=["rlr", "ddpo", "awm", "grpo"]
)
def test_two_processes_make_the_update_of_one(workplace: Path, tmp_path: Path, estimator: dict[str, object]) -> None:
    """The same seed and global batch: one process with two micro-batches against two processes with one each."""
    # A large epsilon keeps Adam's steps proportional to the gradient, so that rounding is not blown up to a sign.
    values = {"max_train_steps": 2, "adam_epsilon": 0.01, **estimator}
    one = config_file(workplace, tmp_path / "one", gradient_accumulation_steps=2, **values)
    run, _ = train_here(one)
    run_on_two_processes(config_file(workplace, tmp_path / "two", gradient_accumulation_steps=1, **values))
    weights = [load_file(tmp_path / name / "checkpoint-2" / WEIGHTS) for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
    # Every number of every term is that of all processes.
    for here, there in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")), strict=True):
        assert here == pytest.approx(there, rel=1e-3, abs=1e-5)
    folder = tmp_path / "two" / "checkpoint-2"
    states = torch.load(folder / "process_states.pt", weights_only=True)
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    state, expected = torch.load(folder / "estimator.pt", weights_only=True), run.estimator.state_dict()
    assert state.keys() == expected.keys()
    for here, there in zip(state.get("old", ()), expected.get("old", ()), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-5)
    for prompt, values_of_prompt in expected.get("rewards", {}).items():
        assert len(values_of_prompt) == 4
        assert state["rewards"][prompt] == pytest.approx(values_of_prompt, abs=1e-5)


def test_half_precision_with_every_memory_option(workplace: Path, tmp_path: Path) -> None:
    """bf16 base, checkpointed denoiser and VAE, 8-bit Adam, DoRA, single decodes, the paper's estimator."""
    flags = "--mixed_precision bf16 --gradient_checkpointing --vae_gradient_checkpointing --use_8bit_adam --use_dora"
    config = config_file(workplace, tmp_path / "out", max_train_steps=2, decode_batch_size=1, estimator="rlr-paper")
    output = finish(start(config, *flags.split(), "--lora_alpha", "8"))
    assert "draws the same images bit for bit" in output
    assert "the zeroth-order term estimates the gradient of the objective smoothed at s = 0.01" in output
    (*_, line) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert all(line[f"gradient_norm/{term}"] > 0 for term in ("first_order", "half_order", "zeroth_order"))
