"""The published AlignProp and DDPO trainers of trl 0.23.1 against our methods, on tiny-shapes, at equal cost.

    python -m venv outputs/peers && . outputs/peers/bin/activate
    pip install -c constraints.txt . trl==0.23.1    # trl is in no other environment of this project

    python -m benchmarks.race --reward coarse --seeds 1 --images 96 --batches 4   # our rows
    python -m benchmarks.peers --reward coarse                                    # theirs: the settings below
    python -m benchmarks.peers --speed                                            # seconds and memory of an update
    python -m benchmarks.peers --reward coarse --collect                          # table, results/peers.json

As in ``benchmarks.race``: the pipeline, T, guidance, prompts in their order, reward, evaluation images and noises, the
cost and its marks, files that are there are skipped. As published: adapter (rank 4), optimiser, clipping, losses,
truncation, and batch and rate of the settings marked so, which are those of trl's example commands. What had to be
another:

- ``sample_eta`` is 0.9999. At 1 the first of ten steps takes the square root of ``1 - abar - std^2``, which is 0 for a
  pipeline with zero terminal SNR and comes out as -6e-8 in float32: every image is NaN.
- ``truncated_rand_backprop_minmax`` is (0, T) as (0, 50) is for their T = 50. The bound is drawn anew at every step, so
  step i of T keeps its gradient with probability (i + 1) / (T + 1), whatever the others do: 5 steps of 10 on average.
- ``mixed_precision`` is "no" on processors, in place of fp16.

Their last step goes to the first timestep, not to a clean image; images are evaluated by our chain, which does.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks.machine import read_results, write_results
from benchmarks.race import MARKS, REWARDS, base_evaluation, claimed, cost_of_scoring, finished_runs, learning_rate
from rlr_peft.build import Run, build_run, peak_memory_mb
from rlr_peft.compare import flat_metrics, paired_gains
from rlr_peft.config import load_config
from rlr_peft.rewards import measure_images
from rlr_peft.tiny_shapes import pipeline_path
from rlr_peft.training import evaluate_adapter, take_update

STEPS = 10
ETA = 0.9999
# What an optimiser step's batch needs, in the trainers' own words: the published one, and another.
BATCHES: dict[tuple[str, int], dict[str, Any]] = {
    ("AlignProp", 32): {"train_batch_size": 8, "train_gradient_accumulation_steps": 4},
    ("AlignProp", 4): {"train_batch_size": 4},
    ("DDPO", 3): {"train_batch_size": 3},
    ("DDPO", 24): {"train_batch_size": 6, "train_gradient_accumulation_steps": 4},
}
DDPO_SAMPLING = {
    "sample_batch_size": 6,
    "sample_num_batches_per_epoch": 4,
    "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_buffer_size": 32,
}
PUBLISHED = [("AlignProp", 32, "0.001"), ("DDPO", 3, "0.0003")]
# Then higher rates and another batch, what says most first.
SETTINGS = [
    *PUBLISHED,
    ("AlignProp", 4, "0.008"),
    ("DDPO", 3, "0.003"),
    ("AlignProp", 4, "0.004"),
    ("AlignProp", 4, "0.016"),
    ("DDPO", 3, "0.001"),
    ("AlignProp", 32, "0.008"),
    ("AlignProp", 4, "0.001"),
    ("DDPO", 24, "0.004"),
]
# What theirs and ours do alike: the gradient of the last step, and one pass over the sampled steps.
Theirs = tuple[str, dict[str, Any]]
PAIRS: dict[str, tuple[Theirs, list[str]]] = {
    "last step": (
        ("AlignProp", {"truncated_backprop_rand": False, "truncated_backprop_timestep": STEPS - 1}),
        ["--estimator", "truncated-bp"],
    ),
    "one pass": (
        ("DDPO", {"sample_batch_size": 4, "sample_num_batches_per_epoch": 1}),
        ["--estimator", "ddpo", "--inner_epochs", "1"],
    ),
}
# Whose rows the table shows beside theirs.
OURS = ("rlr", "auto", "refl", "truncated-bp, K = 1", "ddpo")
SPEED_BATCH = 4
SPEED_UPDATES = 3


def main() -> None:
    """Runs what is missing, or times updates, or collects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=tuple(REWARDS), default="coarse")
    parser.add_argument(
        "--setting", nargs=3, action="append", metavar=("METHOD", "BATCH", "RATE"), help="in their place"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget", type=float, default=12_000, help="of a run, in denoiser forwards of one image")
    parser.add_argument("--images", type=int, default=96, help="of an evaluation")
    parser.add_argument("--folder", type=Path, default=Path("outputs/race"), help="that of benchmarks.race")
    parser.add_argument("--speed", action="store_true", help="seconds and memory of an update, theirs and ours")
    parser.add_argument("--time", nargs=2, metavar=("PAIR", "SIDE"), help="one side of a pair, in this process")
    parser.add_argument("--collect", action="store_true", help="the table of what has run")
    arguments = parser.parse_args()
    folder = arguments.folder / "peers" / arguments.reward
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.collect:
        collect(arguments.folder / arguments.reward, folder, arguments.seed)
    elif arguments.speed:
        write_results("peers", read_results("peers") | {"speed": speeds()})
    elif arguments.time:
        print(json.dumps(timed(*arguments.time)))
    else:
        chosen = [(method, int(batch), learning_rate(rate)) for method, batch, rate in arguments.setting or SETTINGS]
        for setting in chosen:
            path = folder / ("{} batch {} rate {}".format(*setting) + f" seed {arguments.seed}.json")
            with claimed(path) as is_ours:
                if is_ours:
                    result = race(arguments, *setting)
                    path.write_text(json.dumps(result, indent=2) + "\n")


def our_run(reward: str, seed: int, images: int, *words: str) -> Run:
    """What the races build, with the rank of trl's adapter."""
    trained, heldout = REWARDS[reward]
    fixed = ["--config", "benchmarks/laboratory.yaml", "--report_to", "none", "--rank", "4", "--seed", str(seed)]
    fixed += ["--num_inference_steps", str(STEPS), "--reward_fn", trained, "--heldout_reward_fn", heldout]
    fixed += ["--num_evaluation_images", str(images), "--evaluation_batch_size", "32"]
    return build_run(load_config([*fixed, *words]))


class Passes:
    """Counts what a denoiser does from now on, in guided pairs: of a batch of 2 B rows B forwards, or B backwards.

    Attributes:
        forwards: of one image; what gradient checkpointing does again counts again.
        backwards: of one image.
    """

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.forwards = self.backwards = 0.0
        # Before and not after: checkpointing stops a second forward as soon as it has what it needs.
        denoiser.register_forward_pre_hook(self._add_forward)
        denoiser.register_forward_hook(self._watch_backward)

    @property
    def cost(self) -> float:
        """In forwards: a backward pass is two."""
        return self.forwards + 2 * self.backwards

    def _add_forward(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.forwards += len(inputs[0]) / 2

    def _watch_backward(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], outputs: Any) -> None:
        if outputs[0].requires_grad:
            outputs[0].register_hook(lambda _: self._add_backward(len(inputs[0]) / 2))

    def _add_backward(self, images: float) -> None:
        self.backwards += images


class Peer:
    """A trainer of trl on the prompts and the reward of one of our runs.

    Args:
        run: has the prompts, the reward and the seed.
        method: `AlignProp` or `DDPO`.
        settings: of the trainer's config, beside those of the races.

    Attributes:
        passes: of its denoiser so far.
        images: drawn so far.
        updates: optimiser steps so far.
    """

    def __init__(self, run: Run, method: str, settings: dict[str, Any]) -> None:
        # Only here: trl is in an environment of its own.
        from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

        self.images, self.updates, self._epochs = 0, 0, 0
        self._run, self._prompts = run, _prompts(run)
        pipeline = DefaultDDPOStableDiffusionPipeline(str(pipeline_path()))
        common = {
            "seed": run.config.training.seed,
            "mixed_precision": "no",
            "sample_num_steps": STEPS,
            "sample_eta": ETA,
            "sample_guidance_scale": run.config.chain.guidance_scale,
            "save_freq": 10**9,
        }
        trainer: Callable[..., Any] = AlignPropTrainer
        if method == "AlignProp":
            config = AlignPropConfig(**common | {"truncated_rand_backprop_minmax": (0, STEPS)} | settings)
        else:
            config, trainer = DDPOConfig(**common | DDPO_SAMPLING | settings), DDPOTrainer
        self._trainer = trainer(config, self._reward, lambda: (next(self._prompts), {}), pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self._denoiser = pipeline.unet
        self.passes = Passes(self._denoiser)

    def train(self) -> None:
        """One epoch of the trainer: an update of AlignProp, a sampling and some updates of DDPO."""
        self.updates = self._trainer.step(self._epochs, self.updates)
        self._epochs += 1

    def copy_adapter(self) -> None:
        """Puts the trained weights into our run's denoiser."""
        set_peft_model_state_dict(self._run.chain.denoiser, get_peft_model_state_dict(self._denoiser))

    def _reward(self, images: torch.Tensor, prompts: tuple[str], _: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        self.images += len(images)
        return measure_images(self._run.reward, images, prompts).scores, {}


def _prompts(run: Run) -> Iterator[str]:
    for step in itertools.count():
        yield run.sampler.sample(step, 1)[0].text


def race(arguments: argparse.Namespace, method: str, batch: int, rate: str) -> dict[str, Any]:
    """One run, as `benchmarks.race` takes it: trains until the budget is spent, evaluates at equal shares of it."""
    run = our_run(arguments.reward, arguments.seed, arguments.images)
    raced = arguments.folder / arguments.reward
    raced.mkdir(exist_ok=True)
    scoring = cost_of_scoring(run, raced / "unit.json")
    base = base_evaluation(run, raced / "base" / f"seed {arguments.seed}, {arguments.images} images.pt")
    peer = Peer(run, method, BATCHES[method, batch] | {"train_learning_rate": float(rate)})
    points: list[dict[str, float]] = []
    seconds = 0.0
    while len(points) < MARKS:
        started = os.times().user
        peer.train()
        seconds += os.times().user - started
        cost = peer.passes.cost + peer.images * scoring
        if cost >= arguments.budget * (len(points) + 1) / MARKS:
            peer.copy_adapter()
            after = evaluate_adapter(run)
            assert after is not None
            numbers = {"updates": peer.updates, "cost": cost, "cpu_seconds": seconds, "images": peer.images}
            points.append(
                flat_metrics(paired_gains(base, after)) | numbers | {"K": peer.passes.backwards / peer.images}
            )
            print(f"{method} batch {batch} rate {rate}, cost {cost:.0f}: {points[-1]['reward_gain']:+.3f}", flush=True)
    return {"method": method, "batch": batch, "learning_rate": rate, "seed": arguments.seed, "points": points}


def speeds() -> list[dict[str, Any]]:
    """Every pair: each side in processes of its own, twice in turn; the least seconds and the largest memory."""
    rows = []
    for name, ((method, _), words) in PAIRS.items():
        runs: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
        for side in ["theirs", "ours"] * 2:
            command = [sys.executable, "-m", "benchmarks.peers", "--time", name, side]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[side].append(json.loads(output.splitlines()[-1]))
        row: dict[str, Any] = {"theirs": f"{method}, {name}", "ours": words[1]}
        for side, results in runs.items():
            row[f"cpu_seconds_{side}"] = min(result["cpu_seconds"] for result in results)
            row[f"peak_mb_{side}"] = max(result["peak_mb"] for result in results)
            row[f"update_mb_{side}"] = max(result["update_mb"] for result in results)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def timed(name: str, side: str) -> dict[str, float]:
    """CPU seconds of an update, the process's peak memory, and how much of it came with the updates."""
    (method, settings), words = PAIRS[name]
    run = our_run("coarse", 1, 2, "--train_batch_size", str(SPEED_BATCH), "--num_images_per_prompt", "4", *words)
    if side == "theirs":
        peer = Peer(run, method, settings | {"train_batch_size": SPEED_BATCH})
    loaded = peak_memory_mb(run.accelerator.device)
    for step in range(1 + SPEED_UPDATES):
        if step == 1:
            started = os.times().user
        if side == "theirs":
            peer.train()
        else:
            take_update(run, step)
    seconds = (os.times().user - started) / SPEED_UPDATES
    peak = peak_memory_mb(run.accelerator.device)
    return {"cpu_seconds": seconds, "peak_mb": peak, "update_mb": peak - loaded}


def collect(raced: Path, folder: Path, seed: int) -> None:
    """Prints their rows, and ours of the same reward and seed at rate auto and at the best; keeps them in one file."""
    theirs = [run for run in finished_runs(folder) if run["seed"] == seed]
    rows = [("trl 0.23.1", run) for run in theirs]
    for method in OURS:
        runs = [run for run in finished_runs(raced) if run["method"] == method and run["seed"] == seed]
        # The best first, so that it comes once where it is the one with rate auto.
        runs.sort(key=lambda run: -run["points"][-1]["reward_gain"])
        rows += [("ours", run) for i, run in enumerate(runs) if i == 0 or run["learning_rate"] == "auto"]
    rows.sort(key=lambda row: -row[1]["points"][-1]["reward_gain"])
    print("| | method | batch | rate | updates | K | CPU s | gain at 1/4, 2/4, 3/4 | end | held out |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for whose, run in rows:
        *marks, end = run["points"]
        published = ", as published" if (run["method"], run["batch"], run["learning_rate"]) in PUBLISHED else ""
        cells = [whose, run["method"] + published, run["batch"], run["learning_rate"], end["updates"]]
        cells += [f"{end['K']:.1f}", f"{end['cpu_seconds']:.0f}", ", ".join(f"{m['reward_gain']:+.3f}" for m in marks)]
        cells += [f"{end['reward_gain']:+.3f} ± {end['reward_gain_se']:.3f}", f"{end['heldout_gain']:+.3f}"]
        print(f"| {' | '.join(map(str, cells))} |")
    results = read_results("peers")
    print("\n| theirs | ours | CPU s an update | peak MB | of these by the update |\n|---|---|---|---|---|")
    for row in results.get("speed", []):
        seconds = f"{row['cpu_seconds_theirs']:.2f} / {row['cpu_seconds_ours']:.2f}"
        memory = [f"{row[f'{name}_theirs']:.0f} / {row[f'{name}_ours']:.0f}" for name in ("peak_mb", "update_mb")]
        print(f"| {row['theirs']} | {row['ours']} | {seconds} | {' | '.join(memory)} |")
    write_results("peers", results | {"runs": [{"whose": whose, **run} for whose, run in rows]})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
