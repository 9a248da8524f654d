"""How well one update of a method without a reward gradient points along the true gradient, on tiny-shapes.

    python -m benchmarks.update_directions

The reward is the coarse one of the races, which has a gradient: the true one is that of full backpropagation over
images that no method sees. The methods get the same images without it, eight an update, four of a prompt. Cosines are
taken between the entries as Adam scales them, each over its root mean square in all updates; the weights of the
adapter are random and small, since at its start half of every gradient is zero. Writes
``benchmarks/results/update_directions.json``.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import write_results
from benchmarks.race import REWARDS
from rlr_peft.build import Run, build_run, derive_seed
from rlr_peft.config import METHODS, load_config
from rlr_peft.estimators import Batch, RunShape, build_estimator, sample_batch
from rlr_peft.prompt import Prompt

STEPS, SAMPLES, GROUP = 5, 8, 4
TRUE_UPDATES, UPDATES = 32, 64
WEIGHTS = 0.01
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "rlr": ("rlr", {}),
    "awm": ("awm", {}),
    "awm, advantages over the update's deviation": ("awm", {"advantage_std": "update"}),
    "awm, noises of their own": ("awm", {}),
    "nft": ("nft", {}),
    "nft, noises of their own": ("nft", {}),
    "grpo": ("grpo", {}),
}
# Where the images of a prompt share no noises.
OWN = ("awm, noises of their own", "nft, noises of their own")


def main() -> None:
    """Measures every row."""
    run = coarse_run()
    true = torch.stack([_true_gradient(run, 10_000 + update) for update in range(TRUE_UPDATES)])
    halves = torch.cosine_similarity(true[::2].mean(0), true[1::2].mean(0), dim=0)
    print(f"cosine of the true gradient's halves: {halves:.3f}", flush=True)
    batches = [_batch(run, update, GROUP, differentiate=False) for update in range(UPDATES)]
    rows = {}
    for name, (method, knobs) in ROWS.items():
        drawn = patch("rlr_peft.estimators.forward.shared_noise", noise_of_its_own) if name in OWN else nullcontext()
        with drawn:
            rows[name] = row(run, batches, true.mean(0), method, knobs)
        print(name, rows[name], flush=True)
    print(write_results("update_directions", {"rows": rows, "cosine_of_halves": round(float(halves), 4)}))


def coarse_run() -> Run:
    """The races' run, with full backpropagation and small random weights."""
    reward, heldout = REWARDS["coarse"]
    words = ["--config", "benchmarks/laboratory.yaml", "--report_to", "none", "--estimator", "full-bp"]
    words += ["--num_inference_steps", str(STEPS), "--num_images_per_prompt", str(GROUP)]
    words += ["--train_batch_size", str(SAMPLES), "--reward_fn", reward, "--heldout_reward_fn", heldout]
    run = build_run(load_config(words), None)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.chain.parameters:
            parameter.add_(WEIGHTS * torch.randn_like(parameter))
    return run


def row(run: Run, batches: list[Batch], true: torch.Tensor, method: str, knobs: dict[str, Any]) -> dict[str, float]:
    """Mean cosine of an update with the true gradient, with its standard error; its square, evaluations, seconds."""
    estimator = build_estimator(METHODS[method](**knobs), RunShape(STEPS, samples=SAMPLES))
    generator = torch.Generator().manual_seed(0)
    gradients, before, began = [], run.chain.denoiser_evaluations, time.process_time()
    for batch in batches:
        advantages = estimator.advantages(batch.rewards, batch.prompts, GROUP)
        for rollout in batch.rollouts:  # one micro-batch
            blind = replace(rollout, reward_gradient=None)
            estimator.accumulate(run.chain, run.objective, blind, advantages, generator)
        gradients.append(_gradient(run))
    seconds = time.process_time() - began
    updates = torch.stack(gradients)
    scale = updates.square().mean(0).sqrt()
    moved = scale > 0
    cosines = torch.cosine_similarity(updates[:, moved] / scale[moved], (true / scale)[moved][None], dim=1)
    return {
        "cosine": round(float(cosines.mean()), 4),
        "cosine_se": round(float(cosines.std()) / len(cosines) ** 0.5, 4),
        "square": float(f"{updates.square().sum(1).mean():.3g}"),
        "replays": round((run.chain.denoiser_evaluations - before) / (SAMPLES * UPDATES), 2),
        "cpu_seconds": round(seconds / UPDATES, 2),
    }


def noise_of_its_own(clean: torch.Tensor, prompts: Sequence[Prompt], generator: torch.Generator) -> torch.Tensor:
    """For every image, as in the published methods."""
    return torch.randn(clean.shape, generator=generator, dtype=clean.dtype)


def _batch(run: Run, update: int, group: int, differentiate: bool) -> Batch:
    prompts = [prompt for prompt in run.sampler.sample(update, SAMPLES // group) for _ in range(group)]
    seeds = [derive_seed(run.config.training.seed, "samples", update, i) for i in range(SAMPLES)]
    return sample_batch(run.chain, run.objective, prompts, seeds, SAMPLES, differentiate=differentiate)


def _true_gradient(run: Run, update: int) -> torch.Tensor:
    for rollout in _batch(run, update, 1, differentiate=True).rollouts:
        run.estimator.accumulate(run.chain, run.objective, rollout, rollout.rewards, torch.Generator())
    return _gradient(run)


def _gradient(run: Run) -> torch.Tensor:
    """All parameters' ``.grad`` as one vector, which are cleared."""
    parameters = run.chain.parameters
    gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    run.optimizer.zero_grad(set_to_none=True)
    return gradient


if __name__ == "__main__":
    main()
