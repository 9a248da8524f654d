"""Several rewards in whole runs: the recipe in `configs/`, its logs, and resuming with the scales as they were."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.two_rewards import markdown
from rlr_peft.rewards.combination import DECAY
from rlr_peft.training import read_metrics, take_update
from tests.programs import ROOT
from tests.training.runs import WEIGHTS, build, config_file, finish, run_on_two_processes, start, train_here

RECIPE = ROOT / "configs" / "tiny_shapes_two_rewards.yaml"
SMALL = "--max_train_steps 2 --train_batch_size 4 --calibration_samples 4 --num_evaluation_images 4".split()
SMALL += "--num_inference_steps 2 --checkpointing_steps 1 --report_to none --evaluation_batch_size 4".split()


@pytest.fixture(scope="module")
def recipe_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates of the recipe, through the script."""
    out = tmp_path_factory.mktemp("recipe") / "out"
    output = finish(start(RECIPE, *SMALL, "--output_dir", str(out)))
    assert "reward = 1 tiny-shapes/color + 1 tiny-shapes/texture" in output
    return out


def test_every_reward_is_logged_on_its_own_and_the_total_is_their_weighted_sum(recipe_run: Path) -> None:
    first, second = read_metrics(recipe_run / "metrics.jsonl")
    for line in (first, second):
        for name in ("tiny-shapes/color", "tiny-shapes/texture"):
            assert 0 < line[f"reward/{name}"] <= 1 and line[f"reward/{name}/scale"] > 0
        assert line["heldout"] == pytest.approx(line["heldout/tiny-shapes-heldout"])
        assert 0 < line["heldout/tiny-shapes-heldout/texture"] <= 1
        # The curve is on the first scales, those of the first update.
        expected = sum(line[f"reward/{name}"] / first[f"reward/{name}/scale"] for name in second_names(line))
        assert line["reward"] == pytest.approx(expected, rel=1e-4)
    assert first["reward/tiny-shapes/color/scale"] != second["reward/tiny-shapes/color/scale"]


def second_names(line: dict[str, float]) -> list[str]:
    return [name.removeprefix("reward/").removesuffix("/scale") for name in line if name.endswith("/scale")]


def test_base_and_adapter_are_compared_on_every_reward(recipe_run: Path) -> None:
    metrics = json.loads((recipe_run / "metrics.json").read_text())
    names = ["reward", "heldout", "reward/tiny-shapes/color", "reward/tiny-shapes/texture"]
    for name in [*names, "heldout/tiny-shapes-heldout", "heldout/tiny-shapes-heldout/color"]:
        assert {f"{name}_{key}" for key in ("before", "after", "gain", "gain_se")} <= set(metrics), name
    scales = {name: metrics[f"reward/{name}_before"] for name in ("tiny-shapes/color", "tiny-shapes/texture")}
    first = read_metrics(recipe_run / "metrics.jsonl")[0]
    expected = sum(value / first[f"reward/{name}/scale"] for name, value in scales.items())
    assert metrics["reward_before"] == pytest.approx(expected, rel=1e-4)


def test_the_documentation_holds_the_recipes_measured_table() -> None:
    metrics = json.loads((ROOT / "benchmarks" / "results" / "two_rewards.json").read_text())["metrics"]
    assert markdown(metrics) in (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_a_resumed_run_equals_the_uninterrupted_one(recipe_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(recipe_run / "checkpoint-1", out / "checkpoint-1")
    shutil.copy(recipe_run / "metrics.jsonl", out / "metrics.jsonl")
    finish(start(RECIPE, *SMALL, "--output_dir", str(out), "--resume_from_checkpoint", "latest"))
    assert read_metrics(out / "metrics.jsonl") == read_metrics(recipe_run / "metrics.jsonl")
    resumed, whole = load_file(out / WEIGHTS), load_file(recipe_run / WEIGHTS)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    states = [torch.load(folder / "checkpoint-2" / "reward.pt", weights_only=True) for folder in (out, recipe_run)]
    assert states[0] == states[1]
    started = torch.load(recipe_run / "checkpoint-1" / "reward.pt", weights_only=True)
    assert started != states[0], "the scales must have moved, or this proves nothing"


def test_the_first_update_is_scaled_by_images_of_the_base_and_the_second_by_the_first_too(
    workplace: Path, tmp_path: Path
) -> None:
    rewards = {f"{workplace / 'rewards.py'}:redness": 1.0, f"{workplace / 'rewards.py'}:blind_redness": 0.5}
    config = config_file(workplace, tmp_path / "out", reward_fn=rewards, max_train_steps=2)
    fresh = build(config)
    start_scales = fresh.reward.scales()
    run, _ = train_here(config)
    log = read_metrics(tmp_path / "out" / "metrics.jsonl")
    name = "rewards.py:redness"
    assert log[0][f"reward/{name}/scale"] == start_scales[name]
    own = log[1][f"reward/{name}/scale"] ** 2 - DECAY * start_scales[name] ** 2
    assert own / (1 - DECAY) == pytest.approx(variance_of_first_update(config), rel=1e-3)
    assert run.objective.has_gradient is False, "one of the two has no gradient"


def test_the_first_scales_come_from_no_fewer_than_16_images(workplace: Path, tmp_path: Path) -> None:
    rewards = {f"{workplace / 'rewards.py'}:redness": 1.0, "jpeg-compressibility": 0.5}
    few, enough = (
        build(config_file(workplace, tmp_path / str(count), reward_fn=rewards, calibration_samples=count)).reward
        for count in (2, 16)
    )
    assert few.scales() and few.scales() == enough.scales()


def test_scales_stand_still_while_an_update_scores_its_mirrored_samples(workplace: Path, tmp_path: Path) -> None:
    """Otherwise a black-box tail would take the difference of two different rewards."""
    rewards = {f"{workplace / 'rewards.py'}:blind_redness": 1.0, "jpeg-compressibility": 0.5}
    values = {"reward_fn": rewards, "fo_steps": 0, "black_box_steps": 2}
    run = build(config_file(workplace, tmp_path / "out", **values))
    before, seen = run.reward.scales(), []
    score = run.objective.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.objective, "score", lambda *a: (seen.append(run.reward.scales()), score(*a))[1])
        take_update(run, 0)
    assert seen and all(scales == before for scales in seen)
    assert run.reward.scales() != before


def test_scaled_within_groups_every_reward_makes_its_own_advantages(workplace: Path, tmp_path: Path) -> None:
    rewards = {f"{workplace / 'rewards.py'}:blind_redness": 2.0, "jpeg-compressibility": -1.0}
    values = {"reward_fn": rewards, "reward_scaling": "group", "estimator": "grpo", "advantage_clip": 1.1}
    run = build(config_file(workplace, tmp_path / "out", num_images_per_prompt=4, **values))
    books, raw = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.estimator, "learn", books.extend)
        patch.setattr(run.reward, "learn", raw.update)
        take_update(run, 0)
    got = torch.tensor([advantage for book in books for advantage in book.advantages])
    red, size = ((values - values.mean()) / values.std(correction=0) for values in raw.values())
    expected = (2 * red - size) / (2 * red - size).std(correction=0)
    torch.testing.assert_close(got, expected.clamp(-1.1, 1.1), rtol=0.1, atol=0.01)  # up to the floor of a deviation
    assert (expected.abs() > 1.1).any() and len(got) == 4


def test_two_processes_have_the_scales_of_one(workplace: Path, tmp_path: Path) -> None:
    values = {
        "reward_fn": {f"{workplace / 'rewards.py'}:redness": 1.0, "jpeg-compressibility": 0.5},
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "estimator": "reinforce",
        "train_batch_size": 2,
    }
    one = config_file(workplace, tmp_path / "one", gradient_accumulation_steps=2, **values)
    two = config_file(workplace, tmp_path / "two", gradient_accumulation_steps=1, **values)
    train_here(one)
    run_on_two_processes(two)
    files = [tmp_path / name / "checkpoint-2" / "reward.pt" for name in ("one", "two")]
    single, double = (torch.load(file, weights_only=True) for file in files)
    for name, state in single.items():
        assert double[name].pop("reward") == state.pop("reward")
        assert double[name].pop("early") == state.pop("early") == [], "the scales are known"
        assert double[name] == pytest.approx(state, rel=1e-3), name


def variance_of_first_update(config: Path) -> float:
    """From a run of one update whose single reward is the same, so that its samples are the same."""
    from rlr_peft.training import sample_step

    run = build(config)
    batch = sample_step(run, run.update_chain, 0, run.num_images_per_prompt)
    return float(batch.scored.raw["rewards.py:redness"].double().var())


def test_info_of_a_single_reward_is_logged(workplace: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(images, prompts):\n    return images.mean((1, 2, 3)), {'blue': images[:, 2].mean((1, 2))}\n"
    )
    config = config_file(workplace, tmp_path / "out", reward_fn=f"{path}:mine", max_train_steps=1, fo_steps=2)
    train_here(config)
    (line,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert 0 < line["reward/blue"] < 1


def test_a_single_rewards_own_total_is_not_taken_for_its_scores(workplace: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(images, prompts):\n    s = images.mean((1, 2, 3))\n    return s, {'total': s.detach() * 0 + 7}\n"
    )
    train_here(config_file(workplace, tmp_path / "out", reward_fn=f"{path}:mine", max_train_steps=1, fo_steps=2))
    (line,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert line["reward/total"] == 7 and 0 < line["reward"] < 1


def test_a_minimum_alone_needs_no_second_reward(workplace: Path, tmp_path: Path) -> None:
    reward = f"{workplace / 'rewards.py'}:redness"
    config = config_file(workplace, tmp_path / "out", reward_minimum={reward: 10.0}, max_train_steps=1, fo_steps=2)
    train_here(config)
    (line,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert line["reward/rewards.py:redness/below_minimum"] == 1
    scale, redness = line["reward/rewards.py:redness/scale"], line["reward/rewards.py:redness"]
    assert line["reward"] == pytest.approx((redness - 10 * (10 - redness)) / scale, rel=1e-4)
