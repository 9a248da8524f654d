"""Makes everything that tiny-shapes ships, from nothing: ``python -m benchmarks.tiny_shapes.build``.

Stages, in order: ``drawings``, ``vae``, ``latents``, ``judges``, ``unet``, ``export``. Each one can be run by itself,
may be killed at any time: called again, a training goes on from its last checkpoint and a finished stage costs little.
The defaults take about an hour and a half on two quiet CPU cores. ``--processes`` says how many of them draw, encode
and train the denoiser; another number there gives other, equally good, weights.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.tiny_shapes import dataset
from benchmarks.tiny_shapes.autoencoder import encode_drawings, finished_vae, train_vae
from benchmarks.tiny_shapes.denoiser import train_unet
from benchmarks.tiny_shapes.export import export_all
from benchmarks.tiny_shapes.judges import train_judge
from benchmarks.tiny_shapes.loop import LoopSettings, process_count, training_effort
from rlr_peft.rewards import JUDGE_NAMES
from rlr_peft.tiny_shapes import pipeline_path

STAGES = ("drawings", "vae", "latents", "judges", "unet", "export")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the build; the defaults are those of the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--judge", choices=JUDGE_NAMES, default=None, help="train only this judge")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/tiny_shapes_build"), help="work files")
    parser.add_argument("--package_dir", type=Path, default=pipeline_path().parent, help="gets pipeline/ and judges/")
    parser.add_argument("--drawings", type=int, default=72_000, help="training drawings")
    parser.add_argument("--vae_steps", type=int, default=2_200)
    parser.add_argument("--vae_batch_size", type=int, default=16, help="whole images per step; 3 times more crops")
    parser.add_argument("--judge_steps", type=int, default=3_000)
    parser.add_argument("--judge_batch_size", type=int, default=64)
    parser.add_argument("--unet_steps", type=int, default=9_000)
    parser.add_argument("--unet_batch_size", type=int, default=32, help="images per step, over all processes")
    parser.add_argument("--checkpoint_every", type=int, default=500, help="steps")
    parser.add_argument("--log_every", type=int, default=50, help="steps")
    parser.add_argument("--stop_after", type=int, default=None, help="interrupt each training after so many steps")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per process")
    parser.add_argument("--processes", type=int, default=2, help="processes that draw, encode and train the denoiser")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> None:
    """Run the stages that the options ask for and note their wall time in ``work_dir/wall_times.jsonl``."""
    torch.set_num_threads(options.threads)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        start = time.monotonic()
        finished = _run_stage(stage, options)
        if process_count() == 1:  # under torchrun the process that launched it keeps the record
            record = {"stage": stage, "finished": finished, "seconds": round(time.monotonic() - start, 1)}
            print(json.dumps(record), flush=True)
            with (options.work_dir / "wall_times.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        if not finished:
            return


def _run_stage(stage: str, options: argparse.Namespace) -> bool:
    work: Path = options.work_dir
    drawings, latents = work / "drawings.npy", work / "latents.npy"
    loop = LoopSettings(
        steps=options.vae_steps,
        learning_rate=2e-3,
        average_decay=0.99,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        seed=options.seed,
        stop_after=options.stop_after,
    )
    if stage == "drawings":
        dataset.build_drawings(drawings, options.drawings, options.seed, options.processes)
        return True
    if stage == "vae":
        return train_vae(drawings, work / "vae", loop, options.vae_batch_size)
    if stage == "latents":
        encode_drawings(drawings, work / "vae", latents, options.processes)
        return True
    if stage == "judges":
        finished = True
        for number, name in enumerate(JUDGE_NAMES):
            if options.judge in (None, name):
                # The reward judge needs no autoencoder, so it can be trained beside it.
                vae = finished_vae(drawings, work / "vae") if name == "heldout" else None
                settings = replace(
                    loop,
                    steps=options.judge_steps,
                    learning_rate=1e-3,
                    average_decay=0.995,
                    seed=options.seed + 1 + number,
                )
                folder = work / f"judge_{name}"
                finished &= train_judge(name, drawings, folder, settings, options.judge_batch_size, vae)
        return finished
    if stage == "unet":
        if options.processes > 1 and process_count() == 1:
            return _run_with_torchrun(options)
        settings = replace(
            loop,
            steps=options.unet_steps,
            learning_rate=8e-4,
            average_decay=0.999,
            decay_share=0.25,
            seed=options.seed + 7,
        )
        return train_unet(latents, work / "unet", settings, options.unet_batch_size // process_count())
    export_all(drawings, work, options.package_dir)
    return True


def _run_with_torchrun(options: argparse.Namespace) -> bool:
    """Train the denoiser in several processes; returns whether all steps are done."""
    flags = [f"--{name}={value}" for name, value in vars(options).items() if name != "stage" and value is not None]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    subprocess.run([*launcher, "-m", "benchmarks.tiny_shapes.build", "--stage=unet", *flags], check=True)
    return training_effort(options.work_dir / "unet")["steps"] >= options.unet_steps


def main() -> None:
    """Entry point of ``python -m benchmarks.tiny_shapes.build``."""
    build(parse_arguments())


if __name__ == "__main__":
    main()
