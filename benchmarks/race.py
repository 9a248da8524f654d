"""Every method against every other on tiny-shapes, at equal cost: gains in reward on prompts that nobody trained on.

    python -m benchmarks.race --reward coarse --seeds 1 2             # the grid: every rate, every batch
    python -m benchmarks.race --reward coarse --seeds 3 4 5 --best 2  # more seeds for the best two of each row
    python -m benchmarks.race --reward coarse --collect               # tables, figure, results/race_coarse.json

Cost is counted in denoiser forwards of one image, a guided pair being one and half of it one half: a backward pass
counts as two, decoding and scoring an image as many as they take on this machine (measured once, `unit.json`),
calibrations as what they evaluate. A run is evaluated at four marks of its budget, with common prompts and noises for
all methods of a seed, by the reward and a held-out judge; at the end also by the variety of its images and by the KL
from the base, on paths with noise whatever the method trained on.
Each run leaves one JSON file below ``--folder``; runs that are there already are skipped, so a race that was
interrupted goes on, and several processes may share the work. Use one thread for each (``OMP_NUM_THREADS=1``).
"""

import argparse
import contextlib
import functools
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.machine import write_results
from benchmarks.race_report import report
from benchmarks.two_experts import TwoExpertChain, two_expert_pipeline
from rlr_peft.build import Run, build_run
from rlr_peft.compare import Evaluation, flat_metrics, measure_divergence, paired_gains, path_divergence, variety
from rlr_peft.config import AUTO, load_config
from rlr_peft.estimators import AutoEstimator, ForwardEstimator
from rlr_peft.files import replacing_file
from rlr_peft.tiny_shapes import pipeline_path
from rlr_peft.training import (
    calibrate,
    calibration_due,
    calibration_samples,
    evaluate_adapter,
    evaluate_base,
    take_update,
)

# The methods' own defaults instead of the demo's.
MEASURED = ("--calibration_interval", "auto", "--fo_roulette")
DRAWN_WINDOW = ("--noise_window", "{half}", "{top}", "--noise_steps", "{third}")
# What selects each method, and how many images it makes of a prompt: pathwise gradients need no group.
METHODS: dict[str, tuple[list[str], int | str]] = {
    "rlr": (["--estimator", "rlr", *MEASURED, "true"], AUTO),
    "rlr without roulette, two of a prompt": (["--estimator", "rlr", *MEASURED, "false"], 2),
    "auto": (["--estimator", "auto", *MEASURED, "true", "--step_kind", "auto"], AUTO),
    "auto, with noise": (["--estimator", "auto", *MEASURED, "true"], AUTO),
    "full-bp": (["--estimator", "full-bp"], 1),
    "truncated-bp, K = 1": (["--estimator", "truncated-bp"], 1),
    "refl": (["--estimator", "refl"], 1),
    "refl, without noise": (["--estimator", "refl", "--step_kind", "auto"], 1),
    "draft-lv": (["--estimator", "draft-lv"], 1),
    "drtune": (["--estimator", "drtune"], 1),
    "leap": (["--estimator", "leap"], 1),
    "flowbp-sparse": (["--estimator", "flowbp-sparse"], 1),
    "flowbp-sparse, drawn evenly": (["--estimator", "flowbp-sparse", "--step_density", "0"], 1),
    "flowbp-sparse, drawn evenly, without noise": (
        ["--estimator", "flowbp-sparse", "--step_density", "0", "--step_kind", "auto"],
        1,
    ),
    "flowbp-bridge": (["--estimator", "flowbp-bridge"], 1),
    "rsm": (["--estimator", "rsm"], 1),
    "adjoint-matching": (["--estimator", "adjoint-matching"], 1),
    "rlr-paper": (["--estimator", "rlr-paper"], 4),
    "reinforce": (["--estimator", "reinforce"], 4),
    "ddpo": (["--estimator", "ddpo"], 4),
    "grpo": (["--estimator", "grpo"], 4),
    "grpo, noise in two steps": (["--estimator", "grpo", "--noise_window", "{two_below}", "{below}"], 4),
    # As it is run today: the noise keeps the latents' size, in drawn neighbouring steps of the noisier half.
    "grpo, drawn window": ([*"--estimator grpo --step_kind cps --eta 0.8".split(), *DRAWN_WINDOW], 4),
    "d3po": (["--estimator", "d3po"], 4),
    "ram": (["--estimator", "ram", "--step_kind", "ode"], 4),
    "nft": (["--estimator", "nft", "--step_kind", "ode"], 4),
    "awm": (["--estimator", "awm", "--step_kind", "ode"], 4),
    "awm, with noise": (["--estimator", "awm"], 4),
}
# Reward and held-out reward.
REWARDS = {
    "coarse": ("benchmarks.rewards:Centered", "benchmarks.rewards:CenteredHeldout"),
    "fine": ("tiny-shapes/texture", "tiny-shapes-heldout/texture"),
    "all": ("tiny-shapes", "tiny-shapes-heldout"),
    # Three without gradient.
    "black_box": ("benchmarks.rewards:CenteredBlackBox", "benchmarks.rewards:CenteredHeldout"),
    "yes_no": ("benchmarks.rewards:AllRight", "benchmarks.rewards:AllRightHeldout"),
    "jpeg": ("jpeg-compressibility", "tiny-shapes-heldout"),
}
LEARNING_RATES = ("0.002", "0.004", "0.008", "auto")
# Behind a rate, its course where that is not the default: to 0 in the second half for `auto`, else constant.
COURSES = {", falling": "warmup_stable_decay", ", constant": "constant"}
BATCHES = ("4", "16", "auto")
MARKS = 4
# On which the KL from the base is measured.
KL_PATHS = 32

# A method with its batch and its learning rate: numbers, or `auto`.
Setting = tuple[str, str, str]


def main() -> None:
    """Runs what is missing of the chosen part of the grid, or collects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=tuple(REWARDS), required=True)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="METHOD")
    parser.add_argument("--batches", nargs="+", default=BATCHES, metavar="B")
    parser.add_argument("--learning_rates", nargs="+", type=learning_rate, default=LEARNING_RATES, metavar="RATE")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2), metavar="SEED")
    parser.add_argument("--best", type=int, default=None, metavar="N", help="only the N best settings of each method")
    parser.add_argument("--budget", type=float, default=12_000, help="of a run, in denoiser forwards of one image")
    parser.add_argument("--steps", type=int, default=10, help="T of the chain")
    parser.add_argument("--evaluation_steps", type=int, default=None, help="of an evaluation; default: T")
    parser.add_argument("--images", type=int, default=128, help="of an evaluation")
    parser.add_argument("--folder", type=Path, default=Path("outputs/race"), help="a folder per reward goes below")
    parser.add_argument("--experts", type=int, choices=(1, 2), default=1, help="adapters, each for a part of the steps")
    parser.add_argument("--collect", action="store_true", help="tables and figure of what has run")
    arguments = parser.parse_args()
    steps = "" if arguments.steps == 10 else f"_{arguments.steps}"
    experts = "" if arguments.experts == 1 else "_two_experts"
    drawn = "" if arguments.evaluation_steps is None else f"_drawn_with_{arguments.evaluation_steps}"
    folder = arguments.folder / f"{arguments.reward}{steps}{drawn}{experts}"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.collect:
        runs = finished_runs(folder)
        write_results(f"race_{folder.name}", {"rows": report(runs, f"race_{folder.name}", METHODS), "runs": runs})
        return
    for seed in arguments.seeds:
        for setting in settings(folder, arguments):
            path = folder / ("{} batch {} rate {}".format(*setting) + f" seed {seed}.json")
            with claimed(path) as is_ours:
                if is_ours:
                    result = race(folder, arguments.reward, setting, seed, arguments)
                    path.write_text(json.dumps(result, indent=2) + "\n")
                    gains = [f"{p['reward_gain']:+.3f} ({p['heldout_gain']:+.3f})" for p in result["points"]]
                    print(f"{path.stem}: {', '.join(gains)}; {result['points'][-1]['updates']} updates", flush=True)


def learning_rate(text: str) -> str:
    """One spelling of a rate, `4e-3` or `0.004`, since it names files; or `auto`; with its course behind it."""
    number, comma, course = text.partition(",")
    return (AUTO if number == AUTO else f"{float(number):g}") + comma + course


def settings(folder: Path, arguments: argparse.Namespace) -> list[Setting]:
    """What is raced: the grid, or the best settings of every method so far."""
    grid = [
        (method, batch, rate)
        for batch in arguments.batches
        for rate in arguments.learning_rates
        for method in arguments.methods
        if batch != AUTO or method == AUTO
    ]
    if arguments.best is None:
        return grid
    gains: defaultdict[Setting, list[float]] = defaultdict(list)
    for run in finished_runs(folder):
        gains[run["method"], str(run["batch"]), run["learning_rate"]].append(run["points"][-1]["reward_gain"])
    known = sorted((setting for setting in grid if setting in gains), key=lambda setting: -fmean(gains[setting]))
    return [s for method in arguments.methods for s in [s for s in known if s[0] == method][: arguments.best]]


def finished_runs(folder: Path) -> list[dict[str, Any]]:
    """All that have run below the folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*seed*.json"))]


def race(folder: Path, reward: str, setting: Setting, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: trains until the budget is spent, and evaluates at equal shares of it."""
    method, batch, rate = setting
    flags, group = METHODS[method]
    top = arguments.steps
    steps = {"top": top, "below": top - 1, "two_below": top - 2, "half": top // 2 + 1, "third": (top + 1) // 3}
    words = ["--config", "benchmarks/laboratory.yaml", "--report_to", "none", *(flag.format(**steps) for flag in flags)]
    in_micro_batches = ["4", "--gradient_accumulation_steps", AUTO] if batch == AUTO else [batch]
    words += ["--num_images_per_prompt", str(group), "--train_batch_size", *in_micro_batches]
    words += ["--num_evaluation_images", str(arguments.images), "--evaluation_batch_size", "32"]
    words += ["--num_inference_steps", str(arguments.steps)]
    # About as many updates as the budget pays, with a short way back: a measured rate goes by them.
    images = 4 if batch == AUTO else int(batch)
    words += ["--max_train_steps", str(round(arguments.budget / (images * (arguments.steps + 5))))]
    words += [] if arguments.evaluation_steps is None else ["--evaluation_steps", str(arguments.evaluation_steps)]
    words += ["--reward_fn", REWARDS[reward][0], "--heldout_reward_fn", REWARDS[reward][1]]
    number, *course = rate.partition(",")
    words += ["--learning_rate", number, "--lr_scheduler", COURSES.get("".join(course), AUTO), "--seed", str(seed)]
    run = build_run(load_config(words), two_expert_pipeline(pipeline_path()) if arguments.experts == 2 else None)
    if arguments.experts == 2:
        run.chain.__class__ = TwoExpertChain
    scoring = cost_of_scoring(run, folder / "unit.json")
    base = base_evaluation(run, folder / "base" / f"seed {seed}, {arguments.images} images.pt")
    points: list[dict[str, float]] = []
    cost, seconds, step = 0.0, 0.0, 0
    if run.config.optimizer.schedule == "warmup_stable_decay":  # over the budget: how many updates it pays is not known
        run.lr_scheduler.lr_lambdas = [lambda _: max(0.0, min(1.0, 2 * (1 - cost / arguments.budget)))]
    while len(points) < MARKS:
        started, before = os.times().user, run.denoiser_evaluations
        if calibration_due(run, step):
            calibrate(run, step)
            knobs = run.config.estimator.calibration
            assert knobs is not None  # as one is due
            samples = calibration_samples(run, knobs)
            replays = run.denoiser_evaluations - before - samples * run.chain.num_steps
            # A replay is pulled back twice, for the reward's gradient and the noise, and once more by `auto`.
            pulled = 3 if isinstance(run.estimator, AutoEstimator) else 2
            cost += run.denoiser_evaluations - before + 2 * pulled * replays + samples * scoring
            before = run.denoiser_evaluations
        update = take_update(run, step)
        samples = run.samples_per_update
        sampled, passes = samples * run.chain.num_steps, fmean(book.backward_passes for book in update.books)
        replayed = run.denoiser_evaluations - before - sampled + 2 * samples * passes
        # A guided pair counts once, and one alone half.
        at_work = run.estimator.for_reward(run.objective.has_gradient)
        cost += sampled + replayed * (0.5 if isinstance(at_work, ForwardEstimator) else 1) + samples * scoring
        seconds += os.times().user - started
        step += 1
        if cost >= arguments.budget * (len(points) + 1) / MARKS:
            after = evaluate_adapter(run)
            assert after is not None
            comparison = flat_metrics(paired_gains(base, after))
            numbers = {"updates": step, "samples": run.samples_per_update, "cost": cost, "cpu_seconds": seconds}
            points.append(comparison | numbers | {"K": fmean(book.first_order_steps for book in update.books)})
    assert after is not None
    points[-1] |= collapse(run, base, after)
    taken = float(run.lr_scheduler.base_lrs[0])
    return {"method": method, "batch": batch, "learning_rate": rate, "taken": taken, "seed": seed, "points": points}


def collapse(run: Run, base: Evaluation, after: Evaluation) -> dict[str, float]:
    """What a gain may be paid with: variety of the evaluation's images, and nats away from the base on noisy paths."""
    assert base.features is not None and after.features is not None
    variety_of = variety(after.features, [prompt.text for prompt in after.prompts], base.features)
    assert variety_of.overall_change is not None and variety_of.to_base is not None
    noisy = run.chain.at(step_kind="ancestral", eta=1.0)
    measured = functools.partial(path_divergence, noisy)
    divergence = measure_divergence(measured, after.prompts[:KL_PATHS], after.seeds[:KL_PATHS], KL_PATHS)
    return {
        "variety": variety_of.overall.value,
        "variety_change": variety_of.overall_change.value,
        "to_base": variety_of.to_base.value,
        "kl": divergence.mean().item(),
    }


def cost_of_scoring(run: Run, path: Path) -> float:
    """What decoding and scoring an image, with its derivative, costs in denoiser forwards; measured once per folder."""
    if path.exists():
        return float(json.loads(path.read_text())["scoring"])
    prompts = run.sampler.sample(0, 16)
    times: dict[str, list[float]] = {"sampling": [], "scoring": []}
    for seed in range(5):
        started = time.process_time()
        trajectory = run.chain.sample(prompts, range(seed, seed + 16))
        sampled = time.process_time()
        run.objective.measure(trajectory.latents[0], trajectory.prompts)
        times["sampling"].append(sampled - started)
        times["scoring"].append(time.process_time() - sampled)
    ratio = run.chain.num_steps * min(times["scoring"]) / min(times["sampling"])
    path.write_text(json.dumps({"scoring": ratio}) + "\n")
    return ratio


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


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
