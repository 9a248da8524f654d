"""Memory and time of one update against T, K and h, and what we add to the models' own work.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling

Memory is the peak of what autograd holds at once; on a GPU, of what is allocated on top of the models.
Writes ``benchmarks/results/scaling.json``.
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.machine import write_results
from rlr_peft.build import build_run
from rlr_peft.config import load_config
from rlr_peft.diagnose import measured_memory, memory_in_words
from rlr_peft.training import take_update

# (T, flags of the estimator, what it is)
CASES: list[tuple[int, list[str], str]] = [
    *[(t, ["--estimator", "full-bp"], "K = T") for t in (5, 10, 20, 50)],
    *[(20, ["--estimator", "truncated-bp", "--fo_steps", str(k)], f"K = {k}") for k in (1, 2, 5, 10)],
    *[
        (20, ["--estimator", "rlr", "--fo_steps", "4", "--ho_length", str(h)], f"K = 4, tiles of h = {h}")
        for h in (1, 2, 4, 8, 16)
    ],
    (20, ["--estimator", "rlr-paper"], "rlr-paper, h = 2"),
]


def main() -> None:
    """Times every case after one update to warm up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| T | terms | memory, MB | denoiser evaluations | backward steps | seconds |\n|---|---|---|---|---|---|")
    for num_steps, flags, name in CASES:
        row = {"T": num_steps, "terms": name} | measure(num_steps, flags, arguments.batch, arguments.updates)
        rows.append(row)
        print(
            f"| {num_steps} | {name} | {row['memory_mb']:.1f} | {row['evaluations']:.0f} | {row['backward_steps']} | "
            f"{row['seconds']:.2f} |",
            flush=True,
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_results("scaling", {"batch": arguments.batch, "memory": memory_in_words(device), "rows": rows})


def measure(num_steps: int, flags: list[str], batch: int, updates: int) -> dict[str, float]:
    """Seconds, evaluations and backward steps (per sample), and the tape's peak of an update of one micro-batch."""
    words = ["--config", "benchmarks/laboratory.yaml", "--num_inference_steps", str(num_steps), *flags]
    words += ["--train_batch_size", str(batch), "--report_to", "none", "--heldout_reward_fn", "null"]
    run = build_run(load_config(words))
    with measured_memory(run.accelerator.device) as memory:
        take_update(run, 0)
    before, started = run.chain.denoiser_evaluations, time.perf_counter()
    for step in range(1, 1 + updates):
        update = take_update(run, step)
    seconds = (time.perf_counter() - started) / updates
    evaluations = (run.chain.denoiser_evaluations - before) / updates / batch
    return {
        "seconds": seconds,
        "evaluations": evaluations,
        "backward_steps": update.books[0].backward_passes,
        "memory_mb": memory.added / 1e6,
    }


if __name__ == "__main__":
    main()
