"""A whole run at real size on a CPU: trained, killed after its first checkpoint, resumed, proven, compared, described.

    python -m benchmarks.real_run_cpu --case stable-diffusion-1.5-512-bf16
    python -m benchmarks.real_run_cpu --case stable-diffusion-1.5-512-bf16 --resolution 256    # a quarter of the time

A base of the true architecture with random weights is saved in the true file layout; the reward is the aesthetic
predictor on a CLIP ViT-L/14. The recipe of `configs/` trains it for two updates of one image in two steps, by the
script. Then the same run is killed by SIGKILL once its first checkpoint is there, and resumed: is its adapter the
uninterrupted one, byte for byte? Seconds, processor seconds and the peak of resident memory of each process are
written to ``benchmarks/results/real_run_cpu.json``, with the gradient through the VAE against finite differences.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from benchmarks.machine import read_results, write_results
from benchmarks.random_files import base_folder, reward_files, save_base, save_reward

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
SD35 = "stabilityai/stable-diffusion-3.5-medium"
# Hub id of the architecture, recipe, pixels and precision.
CASES = {
    "stable-diffusion-1.5-512-bf16": (SD15, "sd14", 512, "bf16"),
    "stable-diffusion-1.5-512-fp32": (SD15, "sd14", 512, "no"),
    "stable-diffusion-xl-512-bf16": (SDXL, "sdxl", 512, "bf16"),
    "stable-diffusion-xl-1024-bf16": (SDXL, "sdxl", 1024, "bf16"),
    "stable-diffusion-3.5-medium-512-bf16": (SD35, "sd35_medium", 512, "bf16"),
}
# Files are in float16, but for a base whose weights would not fit 24 GiB if all were converted: those in the run's own
# dtype are mapped, and the system takes back what is not used, T5 once the prompts are encoded.
FILES = {SD35: torch.bfloat16}
SHORT = (
    "--estimator truncated-bp --fo_steps 1 --num_inference_steps 2 --train_batch_size 1 --num_images_per_prompt 1 "
    "--gradient_accumulation_steps 1 --max_train_steps 2 --checkpointing_steps 1 --learning_rate 0.0001 "
    "--validation_steps null --validation_prompt null --report_to none --reward_fn aesthetic --heldout_reward_fn null"
).split()
COMPARED = "--num_evaluation_images 2 --evaluation_batch_size 1".split()
ADAPTER, CARD = "pytorch_lora_weights.safetensors", "README.md"
KIB = 2**10


def main() -> None:
    """Runs the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append", required=True, help="may be given again")
    parser.add_argument("--resolution", type=int, help="pixels in place of the case's")
    parser.add_argument("--folder", type=Path, help="where the random bases are kept; default: a temporary folder")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in parsed.case:
            base, recipe, resolution, precision = CASES[name]
            folder = parsed.folder or Path(temporary)
            # In a process of its own, as the C library would keep what is freed.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                process.submit(save_base, base, folder, FILES.get(base, torch.float16)).result()
            save_reward(folder)
            pixels = parsed.resolution or resolution
            words = ["--config", recipe, "--resolution", str(pixels), "--mixed_precision", precision, *SHORT]
            words += ["--pretrained_model_name_or_path", str(base_folder(base, folder))]
            words += ["--pretrained_vae_model_name_or_path", "null"] if recipe == "sdxl" else []
            words += ["--reward_model_path", json.dumps(reward_files(folder))]
            measured = {"pixels": pixels, "recipe": recipe, **measure(words, folder / name)}
            measured["gradient of the VAE"] = vae_gradient(base_folder(base, folder) / "vae", pixels // 4)
            print(json.dumps({name: measured}, indent=2), flush=True)
            write_results("real_run_cpu", {"cases": read_results("real_run_cpu").get("cases", {}) | {name: measured}})


def measure(words: list[str], folder: Path) -> dict[str, Any]:
    """The uninterrupted run, the killed and the resumed one, and what they left.

    Raises:
        SystemExit: one of them failed; with the end of what it printed.
    """
    whole, killed = folder / "whole", folder / "killed"
    results: dict[str, Any] = {}
    results["whole"] = run([*words, "--evaluation_prompt_path", "null", "--output_dir", str(whole)], folder)
    last = killed / "checkpoint-1" / ADAPTER
    results["killed"] = run([*words, *COMPARED, "--output_dir", str(killed)], folder, until=last)
    results["resumed"] = run(
        [*words, *COMPARED, "--output_dir", str(killed), "--resume_from_checkpoint", "latest"], folder
    )
    metrics = json.loads((killed / "metrics.json").read_text())
    files = {
        name: sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        for name, place in (("checkpoint", killed / "checkpoint-2"), ("output", killed))
    }
    return results | {
        "resumed equals whole": (whole / ADAPTER).read_bytes() == (killed / ADAPTER).read_bytes(),
        "bytes": files | {"adapter": (killed / ADAPTER).stat().st_size},
        "card": (killed / CARD).read_text().count("\n"),
        "compared images": metrics["n"],
    }


def run(words: list[str], folder: Path, until: Path | None = None) -> dict[str, float]:
    """The training script as a process: to its end, or killed once a file is there.

    Returns:
        Seconds, seconds of the processor and the most resident GiB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "train_rlr_lora.py", *words], stdout=log, stderr=subprocess.STDOUT)
        while until is not None and not until.exists() and os.waitid(os.P_PID, process.pid, NOT_YET) is None:
            time.sleep(1)
        if until is not None:
            process.kill()
        _, status, used = os.wait4(process.pid, 0)
    if until is None and status != 0:
        sys.exit((folder / "log.txt").read_text()[-2000:])
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "resident_gib": used.ru_maxrss * KIB / 2**30,
    }


NOT_YET = os.WEXITED | os.WNOHANG | os.WNOWAIT


def vae_gradient(folder: Path, pixels: int) -> dict[str, float]:
    """The derivative of the decoded images' mean square in one direction of the latents, in float64: by the tape and by
    a central difference."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float64).requires_grad_(False).eval()
    side = pixels // 2 ** (len(vae.config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(0)
    shape = (1, vae.config.latent_channels, side, side)
    latents, direction = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def value(at: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = vae.decode(at).sample
        return decoded.square().mean()

    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(value(latents), latents)
    step = 1e-5
    with torch.no_grad():
        difference = (value(latents + step * direction) - value(latents - step * direction)) / (2 * step)
    by_tape = float((gradient * direction).sum())
    return {"pixels": pixels, "tape": by_tape, "difference": float(difference)}


if __name__ == "__main__":
    main()
