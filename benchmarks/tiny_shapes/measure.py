"""How good tiny-shapes is: its judges, its autoencoder and how well its images show what the prompts ask.

    python -m benchmarks.tiny_shapes.measure

The errors in shape, color and texture are intended: the last phase of the pipeline's training confuses similar words,
so that a reward has something to improve. The judges were trained on true labels.

Writes ``benchmarks/results/tiny_shapes.json`` and the sample grid ``docs/images/tiny_shapes_samples.png``.
"""

import argparse
import json
import os
import textwrap
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from benchmarks.machine import describe_machine
from benchmarks.tiny_shapes.dataset import fresh_drawings, labels_of
from rlr_peft.rewards import JUDGE_NAMES, Judge, load_judge
from rlr_peft.tiny_shapes import ATTRIBUTES, Scene, judges_path, parse_caption, pipeline_path, prompts

BATCH = 32


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=pipeline_path(), help="folder of the pipeline")
    parser.add_argument("--drawings", type=int, default=2048, help="fresh drawings of unseen scenes")
    parser.add_argument("--prompts", type=int, default=256, help="unseen prompts, one image each")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="lengths of the sampling chain")
    parser.add_argument("--etas", type=float, nargs="+", default=[0.0, 1.0], help="0: deterministic, 1: ancestral")
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--grid_steps", type=int, default=20, help="sampling steps of the images in the grid")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/tiny_shapes.json"))
    parser.add_argument("--grid", type=Path, default=Path("docs/images/tiny_shapes_samples.png"))
    return parser.parse_args()


@torch.no_grad()
def accuracies(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Share of images that the judge reads as the labels say: per attribute, and in all attributes at once."""
    outputs = [judge(batch) for batch in images.split(128)]
    read = torch.stack([torch.cat([output[name] for output in outputs]).argmax(1) for name in ATTRIBUTES], dim=1)
    right = (read == labels).double()
    shares = dict(zip(ATTRIBUTES, right.mean(0).tolist(), strict=True)) | {"all": right.prod(1).mean().item()}
    return {name: round(share, 4) for name, share in shares.items()}


@torch.no_grad()
def reconstruct(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, 64, 64) in [0, 1] through the autoencoder and back."""
    vae = pipeline.vae
    decoded = [vae.decode(vae.encode(batch * 2 - 1).latent_dist.mean).sample for batch in images.split(64)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def generate(
    pipeline: StableDiffusionPipeline, captions: list[str], steps: int, eta: float, guidance_scale: float, seed: int
) -> torch.Tensor:
    """One image per caption, (N, 3, 64, 64) in [0, 1]; image i starts from the noise of seed + i."""
    batches = []
    for start in range(0, len(captions), BATCH):
        batch = captions[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(batch))]
        output = pipeline(
            batch,
            num_inference_steps=steps,
            eta=eta,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        )
        batches.append(torch.from_numpy(np.stack(output.images)).permute(0, 3, 1, 2))
    return torch.cat(batches).float()


def save_grid(images: torch.Tensor, captions: list[str], path: Path, columns: int = 6) -> None:
    """Images with their prompts underneath."""
    matplotlib.use("Agg")
    rows = -(-len(captions) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.6 * rows), layout="constrained")
    for axis, image, caption in zip(axes.flat, images, captions, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(textwrap.fill(caption, 27), fontsize=8, y=0, va="top", pad=-4)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print and write."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    pipeline = StableDiffusionPipeline.from_pretrained(options.pipeline, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if not isinstance(pipeline.scheduler, DDIMScheduler):
        raise TypeError(f"expected a DDIMScheduler, found {type(pipeline.scheduler).__name__}")
    judges = {name: load_judge(name) for name in JUDGE_NAMES}
    weight_files = [*options.pipeline.rglob("*.safetensors"), *judges_path().glob("*.safetensors")]
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "weights_mb": round(sum(file.stat().st_size for file in weight_files) / 1e6, 2),
        "chance": {attribute: round(1 / len(values), 4) for attribute, values in ATTRIBUTES.items()},
    }

    images, labels = fresh_drawings(options.drawings, options.seed)
    reconstructions = reconstruct(pipeline, images)
    error = (reconstructions - images).square().mean((1, 2, 3))
    results["drawings"] = {
        "n": options.drawings,
        "autoencoder_psnr_db": round((-10 * error.log10()).mean().item(), 2),
        "accuracy": {name: accuracies(judge, images, labels) for name, judge in judges.items()},
        "accuracy_after_autoencoder": {
            name: accuracies(judge, reconstructions, labels) for name, judge in judges.items()
        },
    }
    print(json.dumps(results, indent=2), flush=True)

    captions = prompts("test")[: options.prompts]
    asked = torch.tensor([labels_of(Scene(**parse_caption(caption))) for caption in captions])
    results["note"] = "shape, color and texture words were confused on purpose in the last phase of the training"
    results["pipeline"] = []
    for steps in options.steps:
        for eta in options.etas:
            begun = time.monotonic()
            generated = generate(pipeline, captions, steps, eta, options.guidance_scale, options.seed)
            record = {
                "steps": steps,
                "eta": eta,
                "guidance_scale": options.guidance_scale,
                "n": len(captions),
                "seconds": round(time.monotonic() - begun, 1),
                "adherence": {name: accuracies(judge, generated, asked) for name, judge in judges.items()},
            }
            results["pipeline"].append(record)
            print(json.dumps(record), flush=True)

    shown = captions[:24]
    grid_images = generate(pipeline, shown, options.grid_steps, 0.0, options.guidance_scale, options.seed)
    save_grid(grid_images, shown, options.grid)
    results["seconds"] = round(time.monotonic() - started, 1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.results} and {options.grid}")


if __name__ == "__main__":
    main()
