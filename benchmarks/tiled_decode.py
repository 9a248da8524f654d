"""How far a decode in tiles is from the whole one, on the trained VAE of tiny-shapes, and what it spares of real ones.

    python -m benchmarks.tiled_decode

Images of 64 x 64 pixels in tiles of 32: the relative difference of the images, and the cosine of the gradients of the
reward `tiny-shapes` with respect to the latents. Then the memory of one decode of SDXL at 1024 pixels by the
plan, if it is not in the results yet. Writes ``benchmarks/results/tiled_decode.json``.
"""

from typing import Any

import torch

from benchmarks.machine import read_results, write_results
from rlr_peft.build import build_run
from rlr_peft.config import load_config
from rlr_peft.plan import DECODE, plan_run

SAMPLES, TILE = 32, 32
SDXL_TILES = (None, 768, 512)


def main() -> None:
    """Measures, plans, prints and writes."""
    torch.set_num_threads(1)
    errors = {
        "tile": TILE,
        "pixels": 64,
        "samples": SAMPLES,
        **compare(["--config", "benchmarks/laboratory.yaml", "--report_to", "none", "--heldout_reward_fn", "null"]),
    }
    print(errors)
    decodes = read_results("tiled_decode").get("sdxl_1024") or plan_decodes()
    print(write_results("tiled_decode", {"tiny_shapes": errors, "sdxl_1024": decodes}))


def plan_decodes() -> list[dict[str, Any]]:
    """Bytes of the phase, and of one decode on the tape and at its peak, by the size of a tile."""
    words = ["--config", "sdxl", "--train_batch_size", "2"]
    decodes = []
    for tile in SDXL_TILES:
        plan = plan_run(load_config(words if tile is None else [*words, "--vae_tile_size", str(tile)]))
        both = {choice: plan.facts.measured.decode[1, choice] for choice in (False, True)}
        sizes = {"phase": plan.total(DECODE)}
        for choice, name in ((False, "plain"), (True, "checkpointed")):
            sizes |= {f"{name} saved": both[choice].saved, f"{name} peak": both[choice].peak}
        print(tile, {name: round(size / 2**30, 2) for name, size in sizes.items()})
        decodes.append({"tile": tile, **sizes})
    return decodes


def compare(words: list[str]) -> dict[str, float]:
    """Of the images' root mean square, and of the samples' gradients: medians over the samples."""
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tile in ("null", str(TILE)):
        run: Any = build_run(load_config([*words, "--vae_tile_size", tile]))
        prompts = run.sampler.sample(0, SAMPLES)
        latents = run.chain.sample(prompts, range(SAMPLES)).latents[0]
        with torch.no_grad():
            images = run.chain.decode(latents, prompts)
        made.append((images, run.objective.measure(latents, prompts).reward_gradient))
    (whole, gradient), (tiles, other) = made
    norms = [value.flatten(1).norm(dim=1) for value in (whole - tiles, whole, gradient, other)]
    cosines = (gradient * other).flatten(1).sum(1) / (norms[2] * norms[3])
    return {
        "images differ by": float((norms[0] / norms[1]).median()),
        "cosine of the gradients": float(cosines.median()),
        "length of the gradients": float((norms[3] / norms[2]).median()),
    }


if __name__ == "__main__":
    main()
