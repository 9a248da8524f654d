"""Parts of training whose time and memory only a GPU shows, each alone.

    python -m benchmarks.gpu_parts          # on a GPU
    python -m benchmarks.gpu_parts --tiny   # on a CPU: the same code at toy size

- **calibration** of `auto` on SD1.5 at 512: the samples of a micro-batch replayed together, and one by one;
- **encoding** of SD3.5's prompts: text encoders that stay, and that come block by block (``--offload_text_encoders``);
- **videoreward**: a video of five seconds scored and differentiated by a Qwen2-VL of true size, and what the plan says.

Weights are random. Written to ``benchmarks/results/gpu_parts.json`` part by part; what is there already of the same
machine is not measured again.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from benchmarks.large_parity import load
from benchmarks.machine import describe_machine, read_results, write_results
from benchmarks.random_files import base_folder, reward_files, save_base, save_reward
from benchmarks.vlm_checkpoints import write_videoreward
from rlr_peft.build import build_run, peak_memory_mb
from rlr_peft.chain import DenoisingChain, offload_text_encoders, text_encoders
from rlr_peft.config import ChainArguments, load_config
from rlr_peft.plan import build_pipeline, find_architecture, reward_memory
from rlr_peft.rewards.model_files import QWEN2_VL_2B, VIDEO_REWARD, VIDEO_REWARD_CODE
from rlr_peft.tiny_shapes import pipeline_path
from rlr_peft.training import calibrate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLES = 4
TIMED = 4
FRAMES, HEIGHT, WIDTH = 40, 480, 832  # five seconds, of which it looks at ten frames
SD15, SD35 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-3.5-medium"


def main() -> None:
    """Measures what is not there yet, prints and writes it."""
    parser = argparse.ArgumentParser(description="Parts of training whose time and memory only a GPU shows.")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too; nothing is written")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="one part; default: all")
    parser.add_argument("--folder", type=Path, help="where random bases are kept; default: a temporary folder")
    parsed = parser.parse_args()
    if not parsed.tiny and DEVICE.type == "cpu":
        parser.error("expected a GPU for real sizes, got a machine without one; use --tiny")
    kept = read_results("gpu_parts")
    results = kept["parts"] if kept.get("machine") == describe_machine() and not parsed.tiny else {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in parsed.part or PARTS:
            if name not in results:
                results[name] = PARTS[name](parsed.folder or Path(temporary), parsed.tiny)
                if not parsed.tiny:
                    write_results("gpu_parts", {"parts": results})
            print(name, json.dumps(results[name], indent=2), flush=True)


def calibration(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """Seconds and peak MB of a calibration on four samples in one micro-batch."""
    words = ["--config", "configs/tiny_shapes.yaml" if is_tiny else "configs/sd14.yaml", "--report_to", "none"]
    words += ["--train_batch_size", str(SAMPLES), "--num_inference_steps", "10", "--estimator", "auto"]
    words += [
        "--calibration_samples",
        str(SAMPLES),
        "--num_images_per_prompt",
        "2",
        "--output_dir",
        str(folder / "out"),
    ]
    words += ["--heldout_reward_fn", "null"]
    if not is_tiny:
        save_base(SD15, folder)
        save_reward(folder)
        words += ["--pretrained_model_name_or_path", str(base_folder(SD15, folder))]
        words += ["--reward_model_path", json.dumps(reward_files(folder))]
    run = build_run(load_config(words))
    run.chain.sample(run.sampler.sample(0, SAMPLES), range(SAMPLES))  # warms up
    together = watched(lambda: calibrate(run, 0))
    # As a chain answers whose samples cannot be replayed together.
    setattr(run.chain, "separate_samples", lambda count: None)  # noqa: B010
    return {"samples": SAMPLES, "together": together, "one by one": watched(lambda: calibrate(run, 0))}


def encoding(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """Of new prompts one after the other: text encoders on the GPU, and block by block from host memory."""
    architecture = find_architecture(str(pipeline_path()) if is_tiny else SD35)
    pipeline: Any = build_pipeline(architecture, DEVICE, torch.float32 if is_tiny else torch.bfloat16)
    size = 64 if is_tiny else 512
    results, latents = {}, []
    for place in ("on the GPU", "block by block"):
        if place == "block by block":
            for encoder in text_encoders(pipeline).values():
                encoder.to("cpu")
            offload_text_encoders(pipeline, DEVICE)
        chain = DenoisingChain(pipeline, ChainArguments(num_inference_steps=2, resolution=size))
        chain.encode(["to warm up"])

        def encode(chain: DenoisingChain = chain) -> None:
            for i in range(TIMED):
                chain.encode([f"prompt {i}"])

        results[place] = watched(encode, TIMED)
        latents.append(chain.sample(["a red ball"], [0]).latents[0])
    return results | {"largest difference of latents": float((latents[0] - latents[1]).abs().max())}


def videoreward(folder: Path, is_tiny: bool) -> dict[str, Any]:
    """A video's scores with gradient, and the plan's bytes; the network's width is that of Qwen2-VL 2B."""
    torch.manual_seed(0)
    write_videoreward(folder / "qwen", folder / "published", folder / "code.py")
    places = {QWEN2_VL_2B: folder / "qwen", VIDEO_REWARD: folder / "published", VIDEO_REWARD_CODE: folder / "code.py"}
    reward = load("videoreward", places)
    if not is_tiny:
        reward.network = nn.ModuleDict(_qwen2_vl_2b(reward.network["model"].config))
    reward.settings = dataclasses.replace(reward.settings, device=DEVICE)
    reward.network.to(DEVICE)
    shape = (1, 9, 3, 64, 64) if is_tiny else (1, FRAMES, 3, HEIGHT, WIDTH)
    video = torch.rand(shape, device=DEVICE, requires_grad=True)

    def score() -> None:
        scored = reward(video, ["a red ball"], [{}]).scores
        torch.autograd.grad(scored.sum(), video)

    planned = reward_memory("videoreward", 1, torch.float16)
    assert planned is not None
    score()  # warms up
    planned_mb = (planned.weights + planned.scoring + video.nbytes) / 2**20
    return watched(score) | {"planned_mb": planned_mb, "frames": shape[1]}


def _qwen2_vl_2b(small: Any) -> dict[str, nn.Module]:
    """A network of true size for the tokens of the small one, and its head."""
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0}
    text = small.text_config.to_dict() | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151_660,
        "rope_parameters": rope,
        "layer_types": None,
    }
    vision = small.vision_config.to_dict() | {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16}
    ids = {name: value for name, value in small.to_dict().items() if name.endswith("_token_id")}
    with DEVICE:
        model = Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision | {"mlp_ratio": 4}, **ids))
    return {"model": model.to(torch.bfloat16).eval().requires_grad_(False), "head": nn.Linear(1536, 1, bias=False)}


def watched(work: Callable[[], object], count: int = 1) -> dict[str, float]:
    """Seconds of each of so many works in one call, and the peak in MB."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": (time.perf_counter() - started) / count, "peak_memory_mb": peak_memory_mb(DEVICE)}


PARTS = {"calibration": calibration, "encoding": encoding, "videoreward": videoreward}


if __name__ == "__main__":
    main()
