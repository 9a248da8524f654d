"""The memory plans of public checkpoints, as docs/memory.md and the recipes in `configs/` show them.

    python -m benchmarks.memory_plans

Needs neither weights nor a GPU nor the network. Prints a Markdown table and writes
``benchmarks/results/memory_plans.json``.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import write_results
from rlr_peft.config import load_config
from rlr_peft.plan import ADJOINT, DECODE, ENCODING, SAMPLING, plan_run

COMMON = (
    "--prompt_path tiny-shapes/train --reward_fn hpsv2 --mixed_precision bf16 --rank 4 --train_batch_size 2 "
    "--num_images_per_prompt 2 --decode_batch_size 1 --num_inference_steps 20"
).split()
CHECKPOINTED = "--gradient_checkpointing true --vae_gradient_checkpointing true".split()
VIDEO = "--height 480 --width 832 --num_frames 33 --decoded_frames 5 --gradient_checkpointing true --offload true"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CASES: dict[str, tuple[str, list[str]]] = {
    "SD1.5, 512": ("stable-diffusion-v1-5/stable-diffusion-v1-5", ["--resolution", "512"]),
    "SDXL, 1024": ("stabilityai/stable-diffusion-xl-base-1.0", ["--resolution", "1024", *CHECKPOINTED]),
    "SD3.5-medium, 512": ("stabilityai/stable-diffusion-3.5-medium", ["--resolution", "512", *CHECKPOINTED]),
    "FLUX.1-dev, 512, NF4": ("black-forest-labs/FLUX.1-dev", ["--resolution", "512", *CHECKPOINTED, "nf4"]),
    "FLUX.1-dev, 512, bf16": ("black-forest-labs/FLUX.1-dev", ["--resolution", "512", *CHECKPOINTED]),
    "FLUX.1-dev, 512, bf16, offload": (
        "black-forest-labs/FLUX.1-dev",
        ["--resolution", "512", *CHECKPOINTED, "--offload", "true"],
    ),
    "Wan 2.1 1.3B, 33 x 480 x 832, offload": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", VIDEO.split()),
}
RECIPES = (
    *("sd14", "sd21", "sdxl", "sdxl_12gb", "sdxl_turbo"),
    *("sd35_medium", "sd35_medium_8gb", "sd35_medium_nft", "sd35_medium_grpo"),
    *("flux_dev", "flux_dev_awm", "wan21_1_3b", "wan21_1_3b_16gb", "modelscope"),
)
UNIT = 2**30


def main() -> None:
    """Plans every case."""
    results: dict[str, Any] = {}
    totals = [f"| | {' | '.join((ENCODING, SAMPLING, DECODE, ADJOINT))} | peak |", "|---|---|---|---|---|---|"]
    tapes = ["| | denoiser step | checkpointed | decode of one | checkpointed |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, (base, flags) in CASES.items():
            plan = plan_run(load_config(["--pretrained_model_name_or_path", base, *COMMON, *_flags(flags, folder)]))
            results[name] = {"base": base, "flags": [*COMMON, *flags], **plan.as_plain()}
            phases = (_gib(plan.total(phase)) for phase in (ENCODING, SAMPLING, DECODE, ADJOINT))
            totals.append(f"| {name} | {' | '.join(phases)} | {_gib(plan.peak)} |")
            measured = plan.facts.measured
            pairs = [
                *(measured.step.get(choice) for choice in (False, True)),
                *(measured.decode.get((1, choice)) for choice in (False, True)),
            ]
            cells = (f"{_gib(pair.saved)} / {_gib(pair.peak)}" if pair else "-" for pair in pairs)
            tapes.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join([*totals, "", *tapes]))
    recipes = {name: recipe(name) for name in RECIPES}
    print("\n".join(f"{name}: {figures}" for name, figures in recipes.items()))
    print(write_results("memory_plans", {"cases": results, "recipes": recipes}))


def recipe(name: str) -> dict[str, float]:
    """What `configs/NAME.yaml` takes at its peak, and its denoiser step and decode of one with and without
    checkpointing, in GiB. Run from the root of the repository."""
    plan = plan_run(load_config(["--config", f"configs/{name}.yaml"]))
    measured = plan.facts.measured
    figures = {
        "peak": plan.peak,
        "denoiser step": measured.step[False].peak,
        "denoiser step, checkpointed": measured.step.get(True, measured.step[False]).peak,
        "decode of one": measured.decode[1, False].peak,
        "decode of one, checkpointed": measured.decode.get((1, True), measured.decode[1, False]).peak,
    }
    return {key: round(size / UNIT, 2) for key, size in figures.items()}


def _flags(flags: list[str], folder: str) -> list[str]:
    if "nf4" not in flags:
        return flags
    path = Path(folder) / "nf4.json"
    path.write_text(json.dumps(NF4), encoding="utf-8")
    return [*(flag for flag in flags if flag != "nf4"), "--bnb_quantization_config_path", str(path)]


def _gib(size: int) -> str:
    return f"{size / UNIT:.2f}"


if __name__ == "__main__":
    main()
