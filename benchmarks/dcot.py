"""Plain prompts against the Diffusive Chain-of-Thought, as a contrast and with a targeted window, at equal evaluations.

    python -m benchmarks.dcot --stage base      # no training: what stage prompts do to the base
    python -m benchmarks.dcot --stage tune      # one seed: learning rates of both prompts, then windows
    python -m benchmarks.dcot --stage final     # what was best, with other seeds
    python -m benchmarks.dcot --stage collect   # table, pictures, benchmarks/results/dcot.json

The reward is the sum of a mid-scale attribute (shape) and a fine one (texture), each judged in (0, 1]; the other judge,
which nothing is trained against, measures too. The arms share one estimator: first order on the three steps of the fine
stage, and one half-order step of the others, drawn evenly or from the window. Every run leaves one JSON file below
``--folder`` and is skipped where that is there. Use one thread (``OMP_NUM_THREADS=1``).
"""

import argparse
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.dcot_report import report
from benchmarks.machine import write_results
from benchmarks.race import base_evaluation, claimed
from rlr_peft import tiny_shapes
from rlr_peft.build import Run, build_run, load_pipeline, render
from rlr_peft.chain import DenoisingChain
from rlr_peft.compare import evaluate, flat_metrics, paired_gains, prompts_and_seeds
from rlr_peft.config import ChainArguments, load_config
from rlr_peft.prompt import Prompt, as_prompts, make_stages, texts_of
from rlr_peft.prompts import SCALES, as_contrast, decompose_by_rules
from rlr_peft.rewards import HeldoutRewards, TinyShapesJudgeReward
from rlr_peft.training import calibrate, calibration_due, evaluate_adapter, take_update

ATTRIBUTES = ("shape", "texture")
DCOT = ["--dcot_rules", "--dcot_form", "parts"]
CONTRAST = ["--dcot_rules", "--dcot_form", "contrast"]
WINDOWS = {"mid": ["mid"], "auto": ["auto"]}
# At weight 1 a half-order step's gradient is 10 to 30 times as long as that of the first-order steps, and all noise.
SHARED = "--estimator rlr --fo_steps 3 --ho_length 1 --ho_blocks 1 --ho_coefficient 0.05".split()
LEARNING_RATES = (1e-3, 4e-3)
TUNING_SEED = 0
FINAL_SEEDS = (1, 2, 3)
# Base only: how a caption may be split. "alone" names every attribute in its own stage and nowhere else;
# "contrast" is the whole caption everywhere, steered away from it without the stage's attributes.
SPLITS = ("plain", "alone", "growing", "shrinking", "contrast")


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("base", "tune", "final", "collect"), required=True)
    parser.add_argument("--folder", type=Path, default=Path("outputs/dcot"))
    parser.add_argument("--budget", type=int, help="denoiser evaluations of a run; by default 5000, tuning: 3000")
    parser.add_argument("--images", type=int, help="images of an evaluation; by default 96, tuning: 64")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "base":
        path = folder / "base splits.json"
        path.write_text(json.dumps(measure_splits(folder, arguments.images or 96), indent=2) + "\n")
    elif arguments.stage == "collect":
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob("* seed *.json"))]
        splits = json.loads((folder / "base splits.json").read_text())
        finals = [run for run in runs if run["seed"] in FINAL_SEEDS]
        print(write_results("dcot", {"splits": splits, "rows": report(finals, splits, folder), "runs": runs}))
    else:
        is_tuning = arguments.stage == "tune"
        budget, images = (3000, 64) if is_tuning else (5000, 96)
        budget, images = arguments.budget or budget, arguments.images or images
        for arm, flags, rate, seed in tuning_jobs(folder) if is_tuning else final_jobs(folder):
            path = run_path(folder, arm, rate, seed)
            with claimed(path) as is_ours:
                if is_ours:
                    result = train_one(folder, arm, flags, rate, seed, budget, images)
                    path.write_text(json.dumps(result, indent=2) + "\n")
                    print(f"{path.stem}: {result['reward_before']:.4f} -> {result['reward_after']:.4f}", flush=True)


def tuning_jobs(folder: Path) -> Iterator[tuple[str, list[str], float, int]]:
    """Learning rates for plain and stage prompts, then windows at the best rate of the stage prompts."""
    for rate in LEARNING_RATES:
        yield "plain", SHARED, rate, TUNING_SEED
        yield "DCoT", [*SHARED, *DCOT], rate, TUNING_SEED
    rate = best(folder, "DCoT")[1]
    for name, window in WINDOWS.items():
        yield f"DCoT, window {name}", window_flags(window), rate, TUNING_SEED


def final_jobs(folder: Path) -> Iterator[tuple[str, list[str], float, int]]:
    """The four arms, seed by seed."""
    plain_rate, rate = best(folder, "plain")[1], best(folder, "DCoT")[1]
    name = best(folder, "DCoT, window *")[0].removeprefix("DCoT, window ")
    arms = [
        ("plain", SHARED, plain_rate),
        ("DCoT", [*SHARED, *DCOT], rate),
        ("contrast", [*SHARED, *CONTRAST], rate),
        (f"DCoT, window {name}", window_flags(WINDOWS[name]), rate),
    ]
    for seed in FINAL_SEEDS:
        for arm, flags, learning_rate in arms:
            yield arm, flags, learning_rate, seed


def window_flags(window: list[str]) -> list[str]:
    """Flags of an arm whose half-order blocks start in a window."""
    return [*SHARED, *DCOT, "--ho_start", "window", "--ho_window", *window]


def run_path(folder: Path, arm: str, rate: float, seed: int) -> Path:
    """Where the result of a run lies."""
    return folder / f"{arm} lr {rate:g} seed {seed}.json"


def best(folder: Path, arm: str) -> tuple[str, float]:
    """Arm and learning rate with the highest reward among the tuning runs that match."""
    runs = [json.loads(path.read_text()) for path in folder.glob(f"{arm} lr * seed {TUNING_SEED}.json")]
    winner = max(runs, key=lambda run: run["reward_after"])
    return winner["arm"], winner["learning_rate"]


def train_one(
    folder: Path, arm: str, flags: list[str], rate: float, seed: int, budget: int, images: int
) -> dict[str, Any]:
    """Trains until the budget is spent; base and adapter are measured with the prompts that the arm trains with."""
    words = ["--config", "benchmarks/laboratory.yaml", "--report_to", "none"]
    words += ["--num_images_per_prompt", "4", "--num_evaluation_images", str(images), "--evaluation_batch_size", "32"]
    words += ["--reward_fn", "{" + ", ".join(f"tiny-shapes/{name}: 1" for name in ATTRIBUTES) + "}"]
    words += ["--reward_scaling", "none"]
    words += ["--heldout_reward_fn", *(f"tiny-shapes-heldout/{name}" for name in ATTRIBUTES)]
    words += ["--learning_rate", str(rate), "--seed", str(seed), *flags]
    run = build_run(load_config(words))
    prompts = arm if arm in ("plain", "contrast") else "DCoT"
    before = base_evaluation(run, folder / "base" / f"{prompts} seed {seed}, {images} images.pt")
    spent, steps, seconds, coverage = spend(run, budget)
    after = evaluate_adapter(run)
    assert after is not None
    pictures = folder / "pictures" / f"{arm} seed {seed}.pt"
    pictures.parent.mkdir(exist_ok=True)
    torch.save(
        {
            "prompts": [str(p) for p in after.prompts[: len(after.images)]],
            "before": before.images,
            "after": after.images,
        },
        pictures,
    )
    facts = {"updates": steps, "denoiser_evaluations": spent, "cpu_seconds": seconds, "coverage": coverage}
    return (
        {"arm": arm, "learning_rate": rate, "seed": seed, "flags": flags}
        | facts
        | flat_metrics(paired_gains(before, after))
    )


def spend(run: Run, budget: int) -> tuple[int, int, float, str]:
    """Updates until so many denoiser evaluations are spent, calibrations among them."""
    started, step, coverage = os.times().user, 0, ""
    run.chain.denoiser_evaluations = 0
    while run.chain.denoiser_evaluations < budget:
        if calibration_due(run, step):
            calibrate(run, step)
        update = take_update(run, step)
        coverage = update.coverage.describe() if not step else coverage
        step += 1
    return run.chain.denoiser_evaluations, step, os.times().user - started, coverage


def measure_splits(folder: Path, images: int) -> list[dict[str, Any]]:
    """The held-out judge's opinion of all attributes on images of the base, for every way to split a caption."""
    config = load_config(["--config", "benchmarks/laboratory.yaml"])
    pipeline = load_pipeline(config.model, torch.device("cpu"))
    knobs, stages = ChainArguments(num_inference_steps=10, eta=0.0, guidance_scale=4.0), make_stages()
    chains = {
        split: DenoisingChain(pipeline, knobs, stages=stages, stage_form=as_contrast if split == "contrast" else None)
        for split in SPLITS
    }
    heldout = HeldoutRewards([TinyShapesJudgeReward("heldout", name) for name in tiny_shapes.ATTRIBUTES])
    prompts, seeds = prompts_and_seeds(as_prompts(tiny_shapes.prompts("test")), images, TUNING_SEED)
    rows, pictures = [], {}
    for split in SPLITS:
        staged = [split_caption(prompt.text, split) for prompt in prompts]
        chain = chains[split]
        found = evaluate(partial(render, chain), staged, seeds, {"heldout": heldout}, 32)
        means = {name.removeprefix("heldout/"): float(values.mean()) for name, values in found.info.items()}
        rows.append({"split": split, "example": staged[0].stages or [staged[0].text], **means})
        pictures[split] = found.images
        print(rows[-1], flush=True)
    (folder / "pictures").mkdir(exist_ok=True)
    torch.save(
        {"prompts": texts_of(prompts)[: len(found.images)], "images": pictures}, folder / "pictures" / "base splits.pt"
    )
    return rows


def split_caption(caption: str, split: str) -> Prompt:
    """A caption with the stage prompts of one way to split it."""
    attributes = tiny_shapes.parse_caption(caption)

    def naming(*scales: str) -> str:
        return tiny_shapes.describe(
            {name: value for name, value in attributes.items() if tiny_shapes.SCALES[name] in scales}
        )

    if split == "plain":
        return Prompt(caption)
    if split == "alone":
        return Prompt(caption, stages=tuple(naming(scale) for scale in SCALES))
    if split in ("growing", "contrast"):
        return Prompt(caption, stages=decompose_by_rules(caption))
    return Prompt(caption, stages=(caption, naming("mid", "fine"), naming("fine")))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
