"""How far the truncated gradient is from the full one on tiny-shapes: its direction and its length, for every K.

    OMP_NUM_THREADS=1 python -m benchmarks.truncation

Inner products of mean gradients are taken over pairs of different samples (U-statistics), so noise does not pull the
cosines towards zero, nor shared samples towards one. Writes ``benchmarks/results/truncation.json``.
"""

import argparse
from typing import Any

import torch

from benchmarks.machine import write_results
from benchmarks.race import REWARDS
from rlr_peft.build import build_run, derive_seed
from rlr_peft.config import load_config
from rlr_peft.estimators import GradientSketch, measure_step_gradients, sample_batch

DIMENSION = 2048


def main() -> None:
    """Measures every case and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="one prompt each")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| T | reward | K | cosine with the full gradient | length along it |\n|---|---|---|---|---|")
    for num_steps in arguments.steps:
        for kind, (reward, _) in REWARDS.items():
            pathwise = pathwise_gradients(num_steps, reward, arguments.samples)
            full = pathwise.sum(0)
            if cross_product(full, full) <= 0:
                print(f"| {num_steps} | {kind} | | too noisy: {arguments.samples} samples show no gradient | |")
                continue
            for k in sorted({1, 2, num_steps // 4, num_steps // 2, 3 * num_steps // 4}):
                truncated = pathwise[:k].sum(0)
                along = cross_product(truncated, full) / cross_product(full, full)
                squares = cross_product(truncated, truncated) * cross_product(full, full)
                cosine = cross_product(truncated, full) / squares**0.5
                rows.append({"T": num_steps, "reward": kind, "K": k, "cosine": cosine, "length": along})
                print(f"| {num_steps} | {kind} | {k} | {cosine:.2f} | {along:.2f} |", flush=True)
    write_results("truncation", {"samples": arguments.samples, "rows": rows})


def pathwise_gradients(num_steps: int, reward: str, samples: int) -> torch.Tensor:
    """Sketches of every sample's gradient through every step, (T, N, d), float64."""
    words = ["--config", "benchmarks/laboratory.yaml", "--num_inference_steps", str(num_steps), "--reward_fn", reward]
    run = build_run(load_config([*words, "--heldout_reward_fn", "null", "--report_to", "none"]))
    seeds = [derive_seed(run.config.training.seed, "calibration", 0, i) for i in range(samples)]
    prompts = run.sampler.sample(0, samples)
    batch = sample_batch(run.chain, run.objective, prompts, seeds, 16)
    sketch = GradientSketch(run.chain.parameters, DIMENSION)
    pathwise = measure_step_gradients(run.chain, batch.rollouts, batch.rewards, sketch, first_order_only=True).pathwise
    assert pathwise is not None
    return pathwise.double()


def cross_product(first: torch.Tensor, second: torch.Tensor) -> float:
    """Unbiased estimate of the inner product of two expectations from the same N samples, (N, d) each."""
    count = len(first)
    return float((first.sum(0) @ second.sum(0) - (first * second).sum()) / (count * (count - 1)))


if __name__ == "__main__":
    main()
