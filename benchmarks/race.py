"""Every method against every other on tiny-shapes, at equal denoiser evaluations: final reward on unseen prompts.

    python -m benchmarks.race --reward coarse --stage tune      # one seed, every learning rate for every method
    python -m benchmarks.race --reward coarse --stage final     # the best learning rate of each, with other seeds
    python -m benchmarks.race --reward coarse --stage long      # four times the budget: who collapses
    python -m benchmarks.race --reward coarse --stage collect   # tables, figure, benchmarks/results/race_coarse.json

``--methods`` chooses among the methods, the variants of the paper's ablation, of longer truncation and of half the
batch; variants train at the rate of their method. ``--seeds`` gives final and long runs other seeds, and
``--learning_rate`` replaces their best rate.
Each run leaves one JSON file below ``--folder``; runs that are there already are skipped, so a race that was
interrupted goes on, and several processes may share the work. Use one thread for each (``OMP_NUM_THREADS=1``).
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import write_results
from benchmarks.race_report import print_long_runs, report
from rlr_peft.build.run import Run, build_run
from rlr_peft.compare.evaluation import Evaluation, flat_metrics, paired_gains
from rlr_peft.config import load_config
from rlr_peft.durable_files import replacing_file
from rlr_peft.training.update import calibrate, take_update
from rlr_peft.training.validation import evaluate_adapter, evaluate_base

METHODS: dict[str, list[str]] = {
    "rlr": ["--estimator", "rlr"],
    "full-bp": ["--estimator", "full-bp"],
    "truncated-bp, K = 1": ["--estimator", "truncated-bp"],
    "truncated-bp, random K": ["--estimator", "truncated-bp", "--fo_steps", "random"],
    "reinforce": ["--estimator", "reinforce"],
    "rlr-paper": ["--estimator", "rlr-paper"],
    "ddpo": ["--estimator", "ddpo"],
    "grpo": ["--estimator", "grpo"],
    "d3po": ["--estimator", "d3po"],
    "refl": ["--estimator", "refl"],
}
# The paper's Table 5 and Table 9; without both it is truncated-bp with K = 1, h = 2 is rlr-paper itself.
ABLATION: dict[str, list[str]] = {
    "rlr-paper without ZO": ["--estimator", "rlr-paper", "--zo", "none"],
    "rlr-paper without HO": ["--estimator", "rlr-paper", "--ho_blocks", "0"],
    **{f"rlr-paper, h = {h}": ["--estimator", "rlr-paper", "--ho_length", str(h)] for h in (1, 4, 8)},
}
# `rlr` that never leaves K = T; it trains at the rate of `rlr`.
FULL: dict[str, list[str]] = {"full-bp": ["--estimator", "full-bp"]}
# Between K = 1 and K = T; at the rate of K = 1.
TRUNCATION: dict[str, list[str]] = {"truncated-bp, K = 3": ["--estimator", "truncated-bp", "--fo_steps", "3"]}
# More, noisier updates for the same evaluations: 2 prompts instead of 4.
SMALL_BATCH: dict[str, list[str]] = {
    f"{method}, 8 samples": [*(METHODS | FULL | TRUNCATION)[method], "--train_batch_size", "8"]
    for method in ("rlr", "truncated-bp, K = 1", *FULL, *TRUNCATION)
}
VARIANTS = ABLATION | FULL | TRUNCATION | SMALL_BATCH
# The method at whose learning rate a variant trains.
TUNED_AS = dict.fromkeys(ABLATION, "rlr-paper") | dict.fromkeys(FULL, "rlr")
TUNED_AS |= dict.fromkeys(TRUNCATION, "truncated-bp, K = 1")
# Variants and what they are shown beside.
TABLES = {
    "The paper's ablation": (ABLATION, ("rlr", "rlr-paper", "truncated-bp, K = 1")),
    "Half the batch, and other K": (FULL | TRUNCATION | SMALL_BATCH, ("rlr", "truncated-bp, K = 1")),
}
# Reward and held-out reward.
REWARDS = {
    "coarse": ("benchmarks.rewards:Centered", "benchmarks.rewards:CenteredHeldout"),
    "mid": ("benchmarks.rewards:Star", "benchmarks.rewards:StarHeldout"),
    "fine": ("tiny-shapes/texture", "tiny-shapes-heldout/texture"),
}
# Tried as well, and dropped for all methods because half the budget is too short to see their collapses: 1.6e-2 on the
# fine reward, 3.2e-2 on the coarse one.
LEARNING_RATES = {"coarse": (4e-3, 1.6e-2), "mid": (4e-3, 1.6e-2), "fine": (1e-3, 4e-3)}
TUNING_SEED = 0
FINAL_SEEDS = (1, 2, 3)
LONG_SEEDS = (11, 12, 13)
LONG_BUDGETS = 4


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=tuple(REWARDS), required=True)
    parser.add_argument("--stage", choices=("tune", "final", "long", "collect"), required=True)
    parser.add_argument("--folder", type=Path, default=Path("outputs/race"), help="a folder per reward goes below")
    names = (*METHODS, *VARIANTS)
    parser.add_argument("--methods", nargs="+", choices=names, default=tuple(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, metavar="SEED", help="of final or long runs")
    parser.add_argument("--learning_rate", type=float, default=None, help="of final and long runs")
    parser.add_argument("--budget", type=int, default=8000, help="denoiser evaluations of a final run; tuning: half")
    parser.add_argument("--evaluations", type=int, default=2, help="evaluations along a final run; tuning: one")
    parser.add_argument("--images", type=int, default=192, help="images of an evaluation; tuning: half")
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.reward
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "collect":
        collect(folder, f"race_{arguments.reward}")
        return
    for method in arguments.methods:
        budget, evaluations, images = arguments.budget, arguments.evaluations, arguments.images
        if arguments.stage == "tune":
            budget, evaluations, images = budget // 2, 1, images // 2
            jobs = [(rate, TUNING_SEED) for rate in LEARNING_RATES[arguments.reward]]
        elif arguments.stage == "long":
            budget, evaluations = LONG_BUDGETS * budget, LONG_BUDGETS * evaluations
            rate = arguments.learning_rate or best_learning_rate(folder, method)
            jobs = [(rate, seed) for seed in arguments.seeds or LONG_SEEDS]
        else:
            rate = arguments.learning_rate or best_learning_rate(folder, method)
            jobs = [(rate, seed) for seed in arguments.seeds or FINAL_SEEDS]
        for learning_rate, seed in jobs:
            path = folder / f"{method} lr {learning_rate:g} seed {seed}.json"
            with claimed(path) as is_ours:
                if is_ours:
                    result = race(folder, method, learning_rate, seed, budget, evaluations, images)
                    path.write_text(json.dumps(result, indent=2) + "\n")
                    last = result["points"][-1]
                    print(f"{path.stem}: {last['reward_gain']:+.4f} +- {last['reward_gain_se']:.4f}", flush=True)


def race(
    folder: Path,
    method: str,
    learning_rate: float,
    seed: int,
    budget: int,
    evaluations: int,
    images: int,
) -> dict[str, Any]:
    """One run: trains until the budget is spent, and evaluates on the way at equal shares of it."""
    reward, heldout = REWARDS[folder.name]
    words = ["--config", "configs/tiny_shapes.yaml", "--report_to", "none", *(METHODS | VARIANTS)[method]]
    words += ["--num_images_per_prompt", "4", "--num_evaluation_images", str(images), "--evaluation_batch_size", "32"]
    words += ["--reward_fn", reward, "--heldout_reward_fn", heldout]
    words += ["--learning_rate", str(learning_rate), "--seed", str(seed)]
    run = build_run(load_config(words))
    base = base_evaluation(run, folder / "base" / f"seed {seed}, {images} images.pt")
    marks = [budget * (i + 1) / evaluations for i in range(evaluations)]
    points: list[dict[str, float]] = []
    spent, seconds, step = 0, 0.0, 0
    started = os.times().user
    while len(points) < evaluations:
        before = run.chain.denoiser_evaluations
        wanted = run.estimator.wants_calibration(run.objective.has_gradient)
        calibration = run.config.estimator.calibration if wanted else None
        if calibration is not None and step % calibration.calibration_interval == 0:
            calibrate(run, step)
        update = take_update(run, step)
        step += 1
        spent += run.chain.denoiser_evaluations - before
        if spent >= marks[len(points)]:
            seconds += os.times().user - started
            after = evaluate_adapter(run)
            assert after is not None
            comparison = flat_metrics(paired_gains(base, after))
            numbers = {"updates": step, "denoiser_evaluations": spent, "cpu_seconds": seconds}
            points.append(comparison | numbers | {"K": update.books[0].first_order_steps})
            started = os.times().user
    return {"method": method, "learning_rate": learning_rate, "seed": seed, "points": points}


def base_evaluation(run: Run, path: Path) -> Evaluation:
    """The base's scores on the run's evaluation images, kept for the other methods of the same seed."""
    if path.exists():
        return Evaluation(**torch.load(path, weights_only=True))
    base = evaluate_base(run)
    assert base is not None
    path.parent.mkdir(exist_ok=True)
    with replacing_file(path) as aside:
        torch.save(vars(base) | {"prompts": [str(prompt) for prompt in base.prompts], "pictures": []}, aside)
    return base


def best_learning_rate(folder: Path, method: str) -> float:
    """The rate with the highest reward of the tuning runs; a variant takes that of its method.

    Raises:
        FileNotFoundError: a tuning run is missing.
    """
    whole = method.removesuffix(", 8 samples")
    tuned = TUNED_AS.get(whole, whole)
    gains = {}
    for rate in LEARNING_RATES[folder.name]:
        result = json.loads((folder / f"{tuned} lr {rate:g} seed {TUNING_SEED}.json").read_text())
        gains[rate] = result["points"][-1]["reward_gain"]
    return max(gains, key=gains.__getitem__)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether a run is still to be done and no other process does it."""
    claim = path.with_suffix(".claim")
    if path.exists():
        yield False
        return
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        claim.unlink()


def collect(folder: Path, name: str) -> None:
    """Tables of all finished runs, and the committed results."""
    runs: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    finals = [
        run
        for run in runs
        if run["seed"] not in (TUNING_SEED, *LONG_SEEDS)
        and run["learning_rate"] == best_learning_rate(folder, run["method"])
    ]
    print_long_runs([run for run in runs if run["seed"] in LONG_SEEDS])
    write_results(name, {"rows": report(finals, name, TABLES), "runs": runs})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
