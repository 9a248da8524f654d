"""Where the time of a training step goes: sampling, reward, adjoint, and what we add to the models' own work.

    python -m benchmarks.step_time --config benchmarks/laboratory.yaml

Takes any config and its flags. Writes ``benchmarks/results/step_time.json``.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import write_results
from rlr_peft.build import Run, build_run
from rlr_peft.config import config_to_dict, load_config
from rlr_peft.training import calibrate, take_update, update

STEPS = 5


class Stopwatch:
    """Adds up the time spent inside wrapped functions."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def wrap(self, holder: Any, function: str, name: str) -> None:
        """Replaces ``holder.function`` by a timed version of itself."""
        original: Callable[..., Any] = getattr(holder, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.seconds[name] += time.perf_counter() - started

        setattr(holder, function, timed)


def watch(run: Run) -> Stopwatch:
    """Wraps the phases of a step, and the models' own forward and backward passes inside them."""
    stopwatch = Stopwatch()
    stopwatch.wrap(run.chain, "sample", "sampling")
    stopwatch.wrap(run.objective, "measure", "reward")
    stopwatch.wrap(update, "add_term", "adjoint")
    stopwatch.wrap(run.chain.denoiser, "forward", "denoiser forward")
    stopwatch.wrap(run.pipeline.vae, "decode", "VAE forward")
    stopwatch.wrap(torch.autograd, "grad", "backward passes")
    for reward_class in {type(reward) for reward in (run.reward, run.heldout) if reward is not None}:
        stopwatch.wrap(reward_class, "__call__", "reward calls")
    return stopwatch


def main() -> None:
    """Times a few updates after one to warm up."""
    config = load_config(sys.argv[1:], prog="python -m benchmarks.step_time")
    run = build_run(config)
    if run.estimator.wants_calibration(run.objective.has_gradient):
        calibrate(run, 0)
    take_update(run, 0)
    stopwatch = watch(run)
    started = time.perf_counter()
    for step in range(1, 1 + STEPS):
        take_update(run, step)
    total = time.perf_counter() - started
    seconds = {name: value / STEPS for name, value in stopwatch.seconds.items()}
    phases = {name: seconds[name] for name in ("sampling", "reward", "adjoint")}
    models = {name: value for name, value in seconds.items() if name not in phases}
    per_step = total / STEPS
    results: dict[str, Any] = {
        "config": config_to_dict(config),
        "seconds_per_step": per_step,
        "phases": phases | {"rest": per_step - sum(phases.values())},
        "models": models,
        "overhead_seconds": per_step - sum(models.values()),
        "overhead_share": 1 - sum(models.values()) / per_step,
    }
    for title, parts in (("phase", results["phases"]), ("models' own work", models)):
        for name, value in parts.items():
            print(f"{title:17} {name:22} {value:8.3f} s {value / per_step:7.1%}")
    print(f"outside the models' own work {results['overhead_share']:.1%} of {per_step:.3f} s")
    write_results("step_time", results)


if __name__ == "__main__":
    main()
