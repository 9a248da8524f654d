"""Whole runs at real size: the training script on pipelines of the true architectures with random weights.

    python -m benchmarks.real_run                                    # on a GPU: all cases
    python -m benchmarks.real_run --case stable-diffusion-1.5-512    # one of them
    python -m benchmarks.real_run --case tiny                        # on a CPU too: the same code on tiny-shapes

Random weights cost what trained ones cost, and nothing is downloaded. For each case the pipeline is saved in the true
file layout, with a tokenizer of the true size; the reward is the aesthetic predictor on a CLIP ViT-L/14. Then:

- **updates**: seconds and peak memory of one update for several methods, in one process,
- **run**: the training script with the case's recipe, from loading to the card; and the same interrupted half-way and
  resumed: are the adapters equal byte for byte?
- **sharded**: two processes, the denoiser whole in each and shared out (``--shard_denoiser``): seconds, memory, and are
  the adapters equal byte for byte? Two GPUs, or a CPU; asked for by name.

Written to ``benchmarks/results/real_run.json`` after every part, without a GPU to ``real_run_rehearsed.json``; what is
there already of the same machine is not run again.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from benchmarks.machine import describe_machine, read_results, write_results
from benchmarks.random_files import base_folder, reward_files, save_base, save_reward
from rlr_peft.build import Run, build_run, peak_memory_mb
from rlr_peft.config import load_config
from rlr_peft.estimators import RunShape, build_estimator
from rlr_peft.tiny_shapes import PIPELINE_NAME
from rlr_peft.training import calibrate, take_update

UPDATES = 4
STEPS = 10
WARM_UPS, TIMED = 1, 3
METHODS = {
    "truncated-bp, K = 1": "--estimator truncated-bp --fo_steps 1",
    "full-bp, K = T": "--estimator full-bp",
    "auto": "--estimator auto --calibration_samples 4 --calibration_interval 100",
    "rlr, K = 1": "--estimator rlr --fo_steps 1",
    "rlr, K measured": "--estimator rlr --calibration_samples 4",
    "refl": "--estimator refl",
    "grpo": "--estimator grpo",
    "nft": "--estimator nft",
    "ram": "--estimator ram",
}
BATCH = {"train_batch_size": 2, "num_images_per_prompt": 2, "gradient_accumulation_steps": 1}
RESULTS = "real_run" if torch.cuda.is_available() else "real_run_rehearsed"
SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
# Flags of an update that a run's other parts do not depend on; two methods show by how much.
FLAGS = {
    "fp16": "--mixed_precision fp16",
    "tf32": "--mixed_precision no --allow_tf32 true",
    "8bit-adam": "--use_8bit_adam true",
    "compiled": "--torch_compile true",
    "batch-1": "--train_batch_size 1 --num_images_per_prompt 1",
    "batch-4": "--train_batch_size 4",
}
UPDATES_ONLY = {
    **{f"stable-diffusion-1.5-512-{name}": (SD15, "configs/sd14.yaml", flags) for name, flags in FLAGS.items()},
    **{f"stable-diffusion-xl-1024-{name}": (SDXL, "configs/sdxl.yaml", FLAGS[name]) for name in ("batch-1", "batch-4")},
}
# Hub id of the architecture, recipe and flags of each case.
CASES = {
    "tiny": (PIPELINE_NAME, "configs/tiny_shapes.yaml", "--mixed_precision no"),
    "tiny-deterministic": (PIPELINE_NAME, "configs/tiny_shapes.yaml", "--mixed_precision no --full_determinism true"),
    "stable-diffusion-1.5-512": (SD15, "configs/sd14.yaml", ""),
    "stable-diffusion-1.5-512-deterministic": (SD15, "configs/sd14.yaml", "--full_determinism true"),
    "stable-diffusion-xl-1024": (SDXL, "configs/sdxl.yaml", ""),
    **UPDATES_ONLY,
}
UPDATES_ONLY_METHODS = ("truncated-bp, K = 1", "full-bp, K = T")


def main() -> None:
    """Runs the cases, each part in a process of its own, prints and writes the results."""
    parser = argparse.ArgumentParser(description="Whole runs at real size on random weights.")
    parser.add_argument("--case", choices=list(CASES), action="append", help="one case; may be given again")
    parser.add_argument("--folder", type=Path, help="where the random pipelines are kept; default: a temporary folder")
    parser.add_argument(
        "--part", choices=["updates", "run", "sharded"], action="append", help="one part; default: updates and run"
    )
    parser.add_argument("--updates", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.updates:
        measure_updates(parsed.updates, parsed.folder)
        return
    parts = parsed.part or ["updates", "run"]
    if "sharded" in parts and torch.cuda.device_count() == 1:
        parser.error("expected two GPUs, or none, for the part sharded, got one")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.folder or Path(temporary)
        for case in parsed.case or [name for name in CASES if not name.startswith("tiny")]:
            for part in parts:
                measured = measure(case, part, folder)
                failed |= "error" in measured
                print(json.dumps({case: {part: measured}}, indent=2), flush=True)
    sys.exit(failed)


def measure(case: str, part: str, folder: Path) -> dict[str, Any]:
    """One part of one case; what the results file has of the same machine is not measured again."""
    if part == "run" and case in UPDATES_ONLY:
        return {}
    if CASES[case][0] != PIPELINE_NAME:
        save_base(CASES[case][0], folder)
        save_reward(folder)
    if part in WHOLE_RUNS:
        if part not in _kept(case):
            measured = WHOLE_RUNS[part](case, folder)
            if "error" in measured:
                return measured
            _keep(case, part, measured)
    else:
        error = _fails([sys.executable, "-m", "benchmarks.real_run", "--folder", str(folder), "--updates", case])
        if error is not None:
            return {"error": error}
    kept: dict[str, Any] = _kept(case).get(part, {})
    return kept


def _kept(case: str) -> dict[str, Any]:
    results = read_results(RESULTS)
    cases: dict[str, Any] = results["cases"] if results.get("machine") == describe_machine() else {}
    return cases.get(case, {"recipe": CASES[case][1], "flags": CASES[case][2], "steps": STEPS, "samples": 2})


def _keep(case: str, part: str, measured: dict[str, Any]) -> None:
    results = read_results(RESULTS)
    cases = results["cases"] if results.get("machine") == describe_machine() else {}
    write_results(RESULTS, {"cases": cases | {case: _kept(case) | {part: measured}}})


def measure_updates(case: str, folder: Path) -> None:
    """Seconds (mean of ``TIMED`` after a warm-up) and peak memory in MB of an update, kept method by method."""
    output = ("--output_dir", str(folder / "unused"))
    run = build_run(load_config([*_flags(case, folder), *METHODS["full-bp, K = T"].split(), *output]))
    if "sampling" not in _kept(case):
        _keep(case, "sampling", _time_sampling(run))
    measured = _kept(case).get("updates", {})
    for method, flags in METHODS.items():
        if method in measured or (case in UPDATES_ONLY and method not in UPDATES_ONLY_METHODS):
            continue
        config = load_config([*_flags(case, folder), *flags.split(), *output])
        estimator = build_estimator(config.estimator, RunShape(config.chain.num_inference_steps))
        try:
            measured[method] = _time_updates(dataclasses.replace(run, config=config, estimator=estimator))
        except (RuntimeError, ValueError) as error:
            measured[method] = {"error": f"{type(error).__name__}: {error}"[:300]}
            run.optimizer.zero_grad(set_to_none=True)
        _keep(case, "updates", measured)


def _time_sampling(run: Run) -> dict[str, float]:
    """Seconds to draw an update's latents: by the chain, and by the pipeline's own call without it."""
    prompts = run.sampler.sample(0, run.samples_per_update)
    texts = [str(prompt) for prompt in prompts]
    return {
        "chain": _time(lambda: run.chain.sample(prompts, range(len(prompts)))),
        "pipeline": _time(
            lambda: run.pipeline(texts, num_inference_steps=STEPS, output_type="latent", **run.chain.call_arguments)
        ),
    }


def _time(call: Callable[[], object]) -> float:
    """Mean seconds of ``TIMED`` calls after one."""
    call()
    started = time.perf_counter()
    for _ in range(TIMED):
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / TIMED


def _time_updates(run: Run) -> dict[str, Any]:
    device = run.accelerator.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    measured: dict[str, Any] = {}
    if run.estimator.wants_calibration(run.objective.has_gradient):
        started = time.perf_counter()
        calibrate(run, 0)
        measured["calibration_seconds"] = time.perf_counter() - started
    for step in range(WARM_UPS):
        take_update(run, step)
    evaluated, started = run.chain.denoiser_evaluations, time.perf_counter()
    for step in range(WARM_UPS, WARM_UPS + TIMED):
        update = take_update(run, step)  # ends with the gradient's norm on the host: nothing is left on its way
    measured["seconds"] = (time.perf_counter() - started) / TIMED
    measured["denoiser_evaluations"] = (run.chain.denoiser_evaluations - evaluated) / TIMED
    measured["first_order_steps"] = update.books[0].first_order_steps
    measured["peak_memory_mb"] = peak_memory_mb(device)
    return measured


def measure_run(case: str, folder: Path) -> dict[str, Any]:
    """The script from start to card; twice without interruption, and once resumed half-way.

    Returns:
        The run's own ``metrics``, and whether the adapters of a second and of the resumed run equal the first one's
        byte for byte.
    """
    flags = [*_flags(case, folder), *METHODS["rlr, K = 1"].split(), "--checkpointing_steps", str(UPDATES // 2)]
    flags += "--validation_steps null --report_to none --num_evaluation_images 4 --evaluation_batch_size 2".split()
    first, second, half = (folder / f"{case}-{name}" for name in ("first", "second", "half"))
    runs = [(first, UPDATES), (second, UPDATES), (half, UPDATES // 2)]
    # Side by side where there are cores and memory for it.
    with ThreadPoolExecutor(len(runs) if torch.cuda.is_available() else 1) as pool:
        errors = list(pool.map(lambda run: _train(flags, *run), runs))
    errors.append(_train([*flags, "--resume_from_checkpoint", "latest"], half, UPDATES))
    if any(errors):
        return {"error": errors}
    adapters = [(output / "pytorch_lora_weights.safetensors").read_bytes() for output in (first, second, half)]
    metrics = json.loads((first / "metrics.json").read_text())
    return {
        "adapter_bytes": len(adapters[0]),
        "metrics": {name: metrics[name] for name in ("denoiser_evaluations", "peak_memory_mb")},
        "second_equals_first": adapters[1] == adapters[0],
        "resumed_equals_first": adapters[2] == adapters[0],
        "second_differs_by": _distance(adapters[1], adapters[0]),
        "resumed_differs_by": _distance(adapters[2], adapters[0]),
    }


def measure_sharded(case: str, folder: Path) -> dict[str, Any]:
    """Two processes with the denoiser whole in each, and shared out."""
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "1"  # of the processes that are launched
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += "--config_file configs/accelerate/several_gpus.yaml --main_process_port 0".split()
    flags = [*_flags(case, folder), *METHODS["rlr, K = 1"].split(), "--max_train_steps", str(UPDATES)]
    flags += "--validation_steps null --report_to none --evaluation_prompt_path null --learning_rate 0.0001".split()
    results: dict[str, Any] = {}
    adapters = []
    for name, sharded in (("whole", "false"), ("sharded", "true")):
        output, started = folder / f"{case}-{name}", time.perf_counter()
        words = ["train_rlr_lora.py", *flags, "--shard_denoiser", sharded, "--output_dir", str(output)]
        error = _fails([*launch, *words])
        if error is not None:
            return {"error": error}
        memory = json.loads((output / "metrics.json").read_text())["peak_memory_mb"]
        results[name] = {"seconds": time.perf_counter() - started, "peak_memory_mb": memory}
        adapters.append((output / "pytorch_lora_weights.safetensors").read_bytes())
    return results | {"sharded_equals_whole": adapters[0] == adapters[1]}


WHOLE_RUNS = {"run": measure_run, "sharded": measure_sharded}


def _distance(file: bytes, other: bytes) -> float:
    """|a - b| / |b| over all weights of two adapter files."""
    weights = (sorted(load(data).items()) for data in (file, other))
    a, b = (torch.cat([tensor.double().flatten() for _, tensor in tensors]) for tensors in weights)
    return float((a - b).norm() / b.norm())


def _train(flags: Sequence[str], output: Path, updates: int) -> str | None:
    words = ["--max_train_steps", str(updates), "--output_dir", str(output)]
    return _fails([sys.executable, "train_rlr_lora.py", *flags, *words])


def flags_of(case: str) -> list[str]:
    """The case's recipe, batch and rewards, without places of files."""
    name, recipe, flags = CASES[case]
    words = ["--config", recipe, "--num_inference_steps", str(STEPS), *flags.split()]
    for option, count in BATCH.items():
        words += [] if f"--{option}" in words else [f"--{option}", str(count)]
    if name == PIPELINE_NAME:
        return words
    words += ["--pretrained_vae_model_name_or_path", "null", "--reward_fn", "aesthetic", "--heldout_reward_fn", "null"]
    return words


def _flags(case: str, folder: Path) -> list[str]:
    name = CASES[case][0]
    if name == PIPELINE_NAME:
        return flags_of(case)
    places = ["--pretrained_model_name_or_path", str(base_folder(name, folder))]
    return [*flags_of(case), *places, "--reward_model_path", json.dumps(reward_files(folder))]


def _fails(command: Sequence[str]) -> str | None:
    """Runs a command; the last line that it printed if it fails."""
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode == 0:
        return None
    return ([*finished.stdout.strip().splitlines(), *finished.stderr.strip().splitlines()] or ["no output"])[-1]


if __name__ == "__main__":
    main()
