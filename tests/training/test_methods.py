"""Whole runs of every method on a tiny base: what they log, what they leave, and that a resumed run repeats them."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlr_peft.training import (
    CheckpointError,
    LearningSignal,
    calibrate,
    calibration_due,
    finish,
    read_metrics,
    sample_step,
    take_update,
)
from tests.training.runs import WEIGHTS, build, config_file, train_here

MIXED = {
    "step_choice": "inverse-variance",
    "scaled": True,
    "antithetic": True,
    "num_images_per_prompt": 4,
}
STATE_BASELINE = {
    "fo_steps": 1,
    "state_baseline": True,
    "scaled": True,
    "antithetic": True,
    "num_images_per_prompt": 4,
}
MOVING = {
    **{"estimator": "grpo", "step_kind": "flow-sde", "ratio_norm": True},
    **{"noise_window": [2, 4], "noise_steps": 2, "noise_slide": 1},
}
FEW_STEPS = {"num_inference_steps": 2, "guidance_scale": 0.0}  # as distilled models take them
METHODS = {
    "ddpo": ({"estimator": "ddpo", "inner_epochs": 2, "per_prompt_stat_tracking_min_count": 2}, "policy_gradient"),
    "grpo with KL": ({"estimator": "grpo", "kl_beta": 0.1, "kl_steps": 2, "ho_blocks": 2}, "policy_gradient"),
    "d3po": ({"estimator": "d3po", "heldout_reward_fn": "jpeg-compressibility"}, "preference"),
    "refl": ({"estimator": "refl", "fo_steps": 2}, "first_order"),
    "grpo in a window": (MOVING, "policy_gradient"),
    "ram in two steps": ({"estimator": "ram", "step_kind": "ode", **FEW_STEPS}, "forward"),
    "leap in two steps": ({"estimator": "leap", **FEW_STEPS}, "first_order"),
    "auto in one step": (
        {"estimator": "auto", **FEW_STEPS, "num_inference_steps": 1, "calibration_interval": 5},
        "first_order",
    ),
    "auto": ({"estimator": "auto", "fo_roulette": True, "calibration_interval": 5}, "first_order"),
    "auto in a short run": ({"estimator": "auto"}, "first_order"),
    "auto without gradient": ({"estimator": "auto", "reward_fn": "jpeg-compressibility"}, "forward"),
    "auto near the base": (
        {"estimator": "auto", "reward_fn": "jpeg-compressibility", "kl_beta": 0.1, "kl_steps": 2},
        "forward",
    ),
    "truncated-bp, K random": ({"estimator": "truncated-bp", "fo_steps": "random"}, "first_order"),
    "rlr, mixed orders": (MIXED, "mixed_order"),
    "rlr, state baseline": (STATE_BASELINE, "half_order"),
}


def with_scaled_reward(workplace: Path, values: dict[str, object]) -> dict[str, object]:
    """The reward is divided by its running deviation where the values say `scaled`."""
    reward = {"reward_fn": {f"{workplace / 'rewards.py'}:redness": 1.0}} if "scaled" in values else {}
    return {name: value for name, value in values.items() if name != "scaled"} | reward


@pytest.mark.parametrize("name", METHODS)
def test_two_updates(workplace: Path, tmp_path: Path, name: str) -> None:
    values, term = METHODS[name]
    values = with_scaled_reward(workplace, values)
    run, progress = train_here(config_file(workplace, tmp_path / "out", max_train_steps=2, **values))
    assert progress.step == 2 and not progress.stopped_early
    first, second = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert first[f"gradient_norm/{term}"] > 0 and second[f"gradient_norm/{term}"] > 0
    moved = load_file(tmp_path / "out" / "checkpoint-2" / WEIGHTS)
    assert any(value.any() for key, value in moved.items() if "lora_B" in key), "lora_B starts at zero"
    is_unbiased = name.startswith("rlr") or (term != "forward" and run.estimator.state_dict().get("chosen") == "rlr")
    assert ("unbiased" in progress.coverage) == is_unbiased
    assert progress.coverage.startswith("The gradient is biased: ") == (not is_unbiased)
    (optimizer_steps,) = {float(state["step"]) for state in run.optimizer.state_dict()["state"].values()}
    assert optimizer_steps == 2 * run.estimator.inner_epochs
    if name == "ddpo":
        # what is logged is the second epoch, on samples of weights that the first has moved
        assert run.estimator.inner_epochs == 2 and first["policy_ratio_deviation"] > 0.01
        assert first["denoiser_evaluations"] == 4 * 4 + 2 * 4 * 3
    if name == "grpo with KL":
        assert first["policy_ratio_deviation"] < 1e-3
        assert first["kl"] < 1e-10 < second["kl"]  # the mean is what is left of a sample without its noise
    if name == "grpo in a window":
        assert [run.chain.std(t) > 0 for t in (1, 2, 3, 4)] == [False, True, True, False], "it has slid by one"
        assert first["denoiser_evaluations"] == 4 * 4 + 4 * 2, "only the window is trained"
        assert "steps 2, 4 of 4 are left out in updates where it has no noise (2 steps at a" in progress.coverage
    if name == "auto without gradient":
        (trajectory, _), *_ = sample_step(run, run.update_chain, 5, run.num_images_per_prompt).micro_batches
        assert trajectory.stds == (0.0,) * 4, "drawn by the plain solver"
        assert any(run.chain.std(t) > 0 for t in (1, 2, 3, 4))
        # sampled, and by old, base and present weights at each of the four levels
        assert first["denoiser_evaluations"] == 4 * (4 + 3 * 4)
    if name == "auto near the base":
        assert first["kl"] < 1e-10 < second["kl"], "measured on paths with noise"
    if name == "d3po":
        assert first["preference_accuracy"] == 0 and 0 <= second["preference_accuracy"] <= 1
        assert math.isfinite(second["heldout"])
    if name == "rlr, state baseline":
        moments = run.estimator.state_dict()["state_baseline"]["moments"]
        assert set(moments) == {2, 3, 4}, "every step with noise was observed"


def test_the_card_of_another_method_tells_what_it_is(workplace: Path, tmp_path: Path) -> None:
    values, _ = METHODS["ddpo"]
    run, progress = train_here(config_file(workplace, tmp_path / "out", max_train_steps=1, **values))
    finish(run, progress, before=None)
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "clipped policy gradient on all steps, per-prompt statistics advantages" in card
    assert "advantages are divided by a standard deviation that contains the sample's own reward" in card


PROMPT_STATISTICS = {
    "estimator": "ddpo",
    "inner_epochs": 2,
    "per_prompt_stat_tracking_min_count": 3,
    "max_train_samples": 2,
}
LAGGING = {"estimator": "nft", "step_kind": "ode", "old_decay_growth": 0.2, "inner_epochs": 2, "noise_levels": 2}
DRAWN_WINDOW = {
    **{"estimator": "grpo", "step_kind": "cps", "eta": 0.8, "noise_window": [2, 4], "noise_steps": 2},
    **{"inner_epochs": 2, "divergence_limit": 0.1, "advantage_std": "update"},
}
NORMALIZED = {"fo_steps": 1, "scaled": True, "state_baseline": True, "lora_dropout": 0.2}


@pytest.mark.parametrize(
    "values",
    [PROMPT_STATISTICS, NORMALIZED, LAGGING, DRAWN_WINDOW],
    ids=["prompt statistics", "reward scale", "old weights", "drawn window"],
)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    workplace: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    is_scaled = "scaled" in values
    values = with_scaled_reward(workplace, values)
    whole, _ = train_here(config_file(workplace, tmp_path / "whole", max_train_steps=4, **values))
    parts = config_file(workplace, tmp_path / "parts", max_train_steps=4, **values)
    train_here(parts, "--max_train_steps", "2")
    interrupted = (tmp_path / "parts" / "checkpoint-2" / "estimator.pt").read_bytes()
    resumed, _ = train_here(parts, "--resume_from_checkpoint", "latest")
    learns = "noise_window" not in values
    assert (interrupted != (tmp_path / "parts" / "checkpoint-4" / "estimator.pt").read_bytes()) == learns
    for file in (f"checkpoint-4/{WEIGHTS}", "metrics.jsonl"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    torch.testing.assert_close(resumed.estimator.state_dict(), whole.estimator.state_dict(), rtol=0, atol=0)
    assert resumed.reward.state_dict() == whole.reward.state_dict()
    if is_scaled:
        assert whole.reward.scales() != build(parts).reward.scales(), "the scale must have moved"


def test_resuming_with_another_method_is_refused(workplace: Path, tmp_path: Path) -> None:
    config = config_file(workplace, tmp_path / "out", max_train_steps=1, fo_steps=1)
    train_here(config)
    with pytest.raises(CheckpointError, match=r"of estimator ddpo, got .*checkpoint-1, which is of estimator rlr"):
        train_here(config, "--resume_from_checkpoint", "latest", "--estimator", "ddpo", "--fo_steps", "null")


def test_early_stopping_goes_back_to_the_best_weights_and_survives_an_interruption(
    workplace: Path, tmp_path: Path
) -> None:
    """The held-out score is the opposite of the reward: it falls as soon as training works."""
    values = {
        "heldout_reward_fn": f"{workplace / 'rewards.py'}:lack_of_red",
        "early_stopping_steps": 5,
        "estimator": "full-bp",
        "learning_rate": 0.05,
        "max_train_steps": 40,
        "num_inference_steps": 2,
        "use_ema": True,
    }
    config = config_file(workplace, tmp_path / "whole", checkpointing_steps=5, **values)
    _, progress = train_here(config)
    assert progress.step < 40 and progress.step % 5 == 0
    assert progress.stopped_early.startswith(f"Stopped at update {progress.step} because the held-out reward fell")
    best = int(progress.stopped_early.rstrip(".").split()[-1])
    last = tmp_path / "whole" / f"checkpoint-{progress.step}" / WEIGHTS
    for file in (last, last.with_name("lora.pt")):  # the average, and the weights themselves
        assert file.read_bytes() == (tmp_path / "whole" / f"checkpoint-{best}" / file.name).read_bytes()
    again, resumed = train_here(config, "--resume_from_checkpoint", "latest")
    assert resumed.step == progress.step and resumed.stopped_early == progress.stopped_early, "it stays stopped"
    finish(again, resumed, before=None)
    assert progress.stopped_early in " ".join((tmp_path / "whole" / "README.md").read_text().split())

    parts = config_file(workplace, tmp_path / "parts", **values)
    _, interrupted = train_here(parts, "--max_train_steps", "7")  # in the middle of the second window
    assert interrupted.step == 7 and not interrupted.stopped_early
    _, resumed = train_here(parts, "--resume_from_checkpoint", "latest")
    assert (resumed.step, resumed.stopped_early) == (progress.step, progress.stopped_early)
    assert (tmp_path / "parts" / f"checkpoint-{progress.step}" / WEIGHTS).read_bytes() == last.read_bytes()
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_detached_negative_branch_is_said(workplace: Path, tmp_path: Path) -> None:
    values = {"estimator": "full-bp", "num_inference_steps": 2, "detach_negative": True}
    _, progress = train_here(config_file(workplace, tmp_path / "out", max_train_steps=1, **values))
    assert progress.coverage == "The gradient is biased: no gradient passes through the negative branch of guidance."


def test_a_divergence_beyond_its_limit_stops_the_run(workplace: Path, tmp_path: Path) -> None:
    values = {"estimator": "full-bp", "learning_rate": 0.05, "num_inference_steps": 2, "kl_limit": 1e-4}
    _, progress = train_here(config_file(workplace, tmp_path / "out", max_train_steps=20, **values))
    assert progress.step == 10, "the limit is on the mean of ten updates"
    assert "because the divergence from the base" in progress.stopped_early
    kl = [line["kl"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert kl[0] < 1e-9 and sum(kl) / 10 > 1e-4


def test_the_divergence_is_measured_as_often_as_asked_for(workplace: Path, tmp_path: Path) -> None:
    values = {"estimator": "full-bp", "num_inference_steps": 2, "kl_interval": 2}
    train_here(config_file(workplace, tmp_path / "out", max_train_steps=3, **values))
    assert ["kl" in line for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [False, True, False]


def gradient_norm(config: Path, *flags: str) -> float:
    """Norm of the first update's gradient, with all weights moved alike."""
    run = build(config, *flags)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.chain.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return take_update(run, 0).gradient_norm


@pytest.mark.parametrize("estimator", ["rlr-paper", "refl", "grpo"])
def test_images_at_the_limit_of_the_reward_teach_nothing(workplace: Path, tmp_path: Path, estimator: str) -> None:
    """Gradients, score terms, perturbed rewards and group-normalised advantages alike."""
    run = build(config_file(workplace, tmp_path / "out", estimator=estimator, reward_limit=-1000.0))
    metrics = take_update(run, 0).metrics()
    assert metrics["gradient_norm"] == 0 and metrics["reward_satisfied"] == 1
    assert metrics["reward"] > -1, "as the reward itself says"
    assert "all images have reached the --reward_limit" in (LearningSignal.of(run).verdict([metrics]) or "")


def test_a_mapping_of_one_reward_divides_its_gradient_and_leaves_the_penaltys_weight(
    workplace: Path, tmp_path: Path
) -> None:
    config = config_file(workplace, tmp_path / "out", fo_steps=1)
    scaled = config_file(workplace, tmp_path / "scaled", fo_steps=1, **with_scaled_reward(workplace, {"scaled": True}))
    (scale,) = build(scaled).reward.scales().values()
    plain, divided = gradient_norm(config), gradient_norm(scaled)
    assert divided == pytest.approx(plain / scale, rel=1e-4) and scale != 1
    penalty_alone = ["--fo_coefficient", "0", "--ho_coefficient", "0", "--kl_beta", "0.5"]
    plain = gradient_norm(config, *penalty_alone)
    assert gradient_norm(scaled, *penalty_alone) == pytest.approx(plain, rel=1e-4) and plain > 0
    twice = gradient_norm(config, *penalty_alone, "--kl_beta", "1.0")
    assert twice == pytest.approx(2 * plain, rel=1e-4)


def test_a_short_run_measures_on_fewer_samples(workplace: Path, tmp_path: Path) -> None:
    """On as many as a twentieth of its cost pays for; a given interval leaves their number alone.

    Where that is fewer than four, `rlr` measures on four and `auto` draws two, and chooses unmeasured, once.
    """
    both = 3 + 3  # every step once to sample it, and once to replay it
    cases = {"short rlr": ("rlr", 10, {}, 4 * both), "short": ("auto", 10, {}, 2 * 3)}
    cases |= {"longer": ("auto", 200, {}, 14 * both), "long": ("auto", 1000, {}, 16 * both)}
    cases["given"] = ("auto", 10, {"calibration_interval": 5}, 16 * both)
    for name, (estimator, length, given, evaluations) in cases.items():
        values = {"calibration_samples": 16, "num_inference_steps": 3, "estimator": estimator, **given}
        run = build(config_file(workplace, tmp_path / name, max_train_steps=length, **values))
        assert calibration_due(run, 0)
        calibrate(run, 0)
        assert run.denoiser_evaluations == evaluations, name
        unmeasured = "too short to measure, reward gradient through the last step"
        assert (unmeasured in run.method_in_words) == (name == "short")
        again = any(calibration_due(run, step) for step in range(1, length))
        assert again == (name in {"longer", "long", "given"}), "as often as 5 % of the cost pay for"


def test_a_run_with_a_measured_batch_says_so_and_resumes_with_it(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"estimator": "auto", "gradient_accumulation_steps": "auto", "calibration_samples": 8}
    values |= {"reward": "blind_redness"}  # noisy enough for more than one micro-batch
    values |= {"max_train_steps": 10, "checkpointing_steps": 5}
    with caplog.at_level("INFO"):
        whole, _ = train_here(config_file(workplace, tmp_path / "whole", **values))
    assert whole.samples_per_update == 2 * whole.gradient_accumulation_steps > 2
    assert f"An update has {whole.samples_per_update} samples from now on" in caplog.text
    assert "the accumulation steps are measured" in caplog.text
    assert "The reward has no gradient: auto is ram" in caplog.text
    parts = config_file(workplace, tmp_path / "parts", **values)
    train_here(parts, "--max_train_steps", "5")
    resumed, _ = train_here(parts, "--resume_from_checkpoint", "latest")
    assert resumed.gradient_accumulation_steps == whole.gradient_accumulation_steps
    for file in (f"checkpoint-10/{WEIGHTS}", "metrics.jsonl"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
