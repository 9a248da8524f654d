"""What `--detach_negative` spares and costs: time and memory of a replayed step, and the direction of the gradient.

    OMP_NUM_THREADS=1 python -m benchmarks.guidance

The middle-sized UNet has the layout of Stable Diffusion 1.5 at half its width, and random weights: time and memory do
not depend on them. Seconds are CPU time, in which the two ways take turns; memory is what autograd holds of the step.
Gradients are those of the last K steps of tiny-shapes at guidance 4. Writes ``benchmarks/results/guidance.json``.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.machine import write_results
from rlr_peft.build import Run, attach_adapters, build_run, build_training_chain
from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain import DenoisingChain, ReplayedStep, Segment, family_of, run
from rlr_peft.config import Config, load_config
from rlr_peft.diagnose import clear_gradients
from rlr_peft.plan import build_pipeline, find_architecture

REPEATS = 7
SAMPLES, BATCH = 64, 8
TINY = ["--config", "benchmarks/laboratory.yaml", "--report_to", "none", "--heldout_reward_fn", "null"]
MIDDLE = [
    *("--pretrained_model_name_or_path", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--resolution", "256"),
    *("--prompt_path", "simple-animals", "--reward_fn", "jpeg-compressibility", "--num_inference_steps", "2"),
]
HALF_WIDTH = {"block_out_channels": [160, 320, 640, 640]}


def main() -> None:
    """Measures, prints a table and writes the results."""
    tiny = build_run(load_config([*TINY, "--train_batch_size", str(BATCH)]))
    rows: list[dict[str, Any]] = [
        {"model": f"tiny-shapes, {BATCH} samples", **costs(*both(tiny.config, tiny.pipeline), BATCH)},
        {"model": "SD 1.5 of half the width, 256 pixels, 2 samples", **costs(*middle(), 2)},
    ]
    print("| model | replay and backward, s | detached | on the tape, MB | detached | sampled step, s | detached |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        numbers = [f"{row[name][way]:.3g}" for name in ("seconds", "tape_mb", "sampled_seconds") for way in (0, 1)]
        print(f"| {row['model']} | {' | '.join(numbers)} |")
    directions = compare_gradients(tiny)
    print("\n| K of 10 | cosine with the whole gradient | length against it |\n|---|---|---|")
    for found in directions:
        print(f"| {found['K']} | {found['cosine']:.2f} | {found['length']:.2f} |")
    write_results("guidance", {"costs": rows, "samples": SAMPLES, "gradients": directions})


def both(config: Config, pipeline: Any) -> tuple[DenoisingChain, DenoisingChain]:
    """The chain as it is, and with the negative branch detached."""
    ways = [replace(config, training=replace(config.training, detach_negative=way)) for way in (False, True)]
    plain, detached = (build_training_chain(way, pipeline, None) for way in ways)
    return plain, detached


def middle() -> tuple[DenoisingChain, DenoisingChain]:
    """Chains over random weights."""
    config = load_config(MIDDLE)
    architecture = find_architecture(config.model.pretrained_model_name_or_path)
    unet = {**architecture.components["unet"], **HALF_WIDTH}
    architecture = replace(architecture, components={**architecture.components, "unet": unet})
    pipeline = build_pipeline(architecture, torch.device("cpu"), torch.float32)
    attach_adapters(config, pipeline, family_of(pipeline))
    return both(config, pipeline)


def costs(plain: DenoisingChain, detached: DenoisingChain, batch: int) -> dict[str, list[float]]:
    """Seconds of a replay with its backward pass, megabytes on its tape, seconds of a sampled step; each both ways."""
    trajectory = plain.sample(["a cat"] * batch, list(range(batch)))
    t = (plain.num_steps + 1) // 2
    cotangent = torch.ones_like(trajectory.latents[0])
    chains = (plain, detached)

    def backward(chain: DenoisingChain) -> None:
        ReplayedStep(chain, trajectory, t).into_both(cotangent)

    def sample(chain: DenoisingChain) -> None:
        chain.denoise(trajectory, t, trajectory.latents[t], t - 1)

    tapes = []
    for chain in chains:
        with counted_tape() as tape:
            step = ReplayedStep(chain, trajectory, t)
            tapes.append(tape.live / 1e6)
        del step
    return {"seconds": timed(backward, chains), "tape_mb": tapes, "sampled_seconds": timed(sample, chains)}


def timed(work: Callable[[DenoisingChain], None], chains: tuple[DenoisingChain, ...]) -> list[float]:
    """Median CPU seconds of the work on each chain, by turns, after one to warm up."""
    seconds: list[list[float]] = [[] for _ in chains]
    for repeat in range(1 + REPEATS):
        for chain, kept in zip(chains, seconds, strict=True):
            started = time.process_time()
            work(chain)
            if repeat:
                kept.append(time.process_time() - started)
    return [median(kept) for kept in seconds]


def compare_gradients(tiny: Run) -> list[dict[str, float]]:
    """Of the detached gradient against the whole one, both of the mean reward of the same samples, by K."""
    chains = both(tiny.config, tiny.pipeline)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # at the base itself half of an adapter's weights have no gradient
        for parameter in chains[0].parameters:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    lengths, size = sorted({1, 3, chains[0].num_steps}), sum(p.numel() for p in chains[0].parameters)
    totals = {(k, way): torch.zeros(size, dtype=torch.float64) for k in lengths for way in (0, 1)}
    for start in range(0, SAMPLES, BATCH):
        part = tiny.prompts[start : start + BATCH]
        trajectory = chains[0].sample(part, list(range(start, start + BATCH)))
        cotangent = tiny.objective.measure(trajectory.latents[0], part).reward_gradient
        for (k, way), total in totals.items():
            clear_gradients(chains[way])
            run(chains[way], trajectory, Segment("first_order", range(1, k + 1), cotangent))
            total += torch.cat([p.grad.flatten() for p in chains[way].parameters if p.grad is not None]).double()
    return [
        {
            "K": k,
            "cosine": float(torch.nn.functional.cosine_similarity(totals[k, 0], totals[k, 1], dim=0)),
            "length": float(totals[k, 1].norm() / totals[k, 0].norm()),
        }
        for k in lengths
    ]


if __name__ == "__main__":
    main()
