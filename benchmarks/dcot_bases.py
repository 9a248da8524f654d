"""Does a Chain-of-Thought pay on a base that knows parts of captions, or where captions are too long to be read?

    python -m benchmarks.dcot_bases --stage train     # about 20 minutes of one core; killed, it goes on where it was
    python -m benchmarks.dcot_bases --stage measure   # benchmarks/results/dcot_bases.json and the table

Two bases: tiny-shapes as it is shipped, whose captions nearly always told everything; and the same weights trained on,
mostly on captions that tell a part only (those of one or two scales, as stage prompts are) and on long ones, with a
clause for every attribute. The text encoder holds 20 tokens for both: the usual caption fits, the long one does not.
The words of shape, color and texture are confused in the last half of that training as in the shipped one's, so that
both bases have the same room for improvement. Nothing is trained on a reward here.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from benchmarks.machine import write_results
from benchmarks.tiny_shapes.dataset import as_images, build_drawings, scene_at
from benchmarks.tiny_shapes.denoiser import confuse, sample_timesteps
from benchmarks.tiny_shapes.loop import LoopSettings, load_averaged_weights, train
from rlr_peft import tiny_shapes
from rlr_peft.build import load_pipeline, render
from rlr_peft.chain import DenoisingChain
from rlr_peft.compare import evaluate, prompts_and_seeds
from rlr_peft.config import ChainArguments, load_config
from rlr_peft.prompt import Prompt, as_prompts, make_stages
from rlr_peft.prompts import SCALES, as_contrast, decompose_by_rules
from rlr_peft.rewards import HeldoutRewards, TinyShapesJudgeReward

TOKENS = 20
"""What the text encoder holds of a prompt, with start and end: the longest usual caption has 19, the long one 31."""
DRAWINGS, STEPS, BATCH = 12_000, 1_600, 32
CONFUSED_FROM = 0.5
EMPTY, DENSE, LONG = 0.1, 0.2, 0.3  # the rest are captions of some scales only
PARTS = (("coarse",), ("mid",), ("fine",), ("coarse", "mid"), ("mid", "fine"), ("coarse", "fine"))
BASES, CAPTIONS = ("as shipped", "partial and long"), ("usual", "long")
SPLITS = ("plain", "alone", "growing", "contrast")


def long_caption(attributes: Mapping[str, str], order: list[str]) -> str:
    """A clause for every attribute; ``tiny_shapes.parse_caption`` reads it as the usual one."""
    return " ".join(tiny_shapes.describe({name: attributes[name]}) for name in order)


def training_caption(row: int, confused: bool, generator: torch.Generator) -> str:
    """The caption of drawing ``row`` for the second base."""
    kind, part, *coins = torch.rand(2 + len(tiny_shapes.ATTRIBUTES), generator=generator).tolist()
    order = [
        list(tiny_shapes.ATTRIBUTES)[i]
        for i in torch.randperm(len(tiny_shapes.ATTRIBUTES), generator=generator).tolist()
    ]
    attributes = asdict(scene_at(row))
    if confused:
        attributes = {name: confuse(name, attributes[name], coin) for name, coin in zip(attributes, coins, strict=True)}
    if kind < EMPTY:
        return ""
    if kind < EMPTY + DENSE:
        return tiny_shapes.describe(attributes)
    if kind < EMPTY + DENSE + LONG:
        return long_caption(attributes, order)
    told = PARTS[int(part * len(PARTS))]
    return tiny_shapes.describe({name: value for name, value in attributes.items() if tiny_shapes.SCALES[name] in told})


def shipped() -> StableDiffusionPipeline:
    """tiny-shapes in float32, reading ``TOKENS`` tokens of a prompt."""
    pipeline = load_pipeline(load_config(["--config", "benchmarks/laboratory.yaml"]).model, torch.device("cpu"))
    pipeline.tokenizer.model_max_length = TOKENS
    return pipeline


def latents_of_drawings(pipeline: StableDiffusionPipeline, folder: Path) -> torch.Tensor:
    """(DRAWINGS, 4, 16, 16), by the shipped autoencoder."""
    path = folder / "latents.npy"
    if not path.exists():
        build_drawings(folder / "drawings.npy", DRAWINGS, seed=0, processes=1)
        drawings = np.load(folder / "drawings.npy", mmap_mode="r")
        with torch.no_grad():
            encoded = [
                pipeline.vae.encode(as_images(drawings[start : start + 100]) * 2 - 1).latent_dist.mean
                for start in range(0, DRAWINGS, 100)
            ]
        np.save(path, torch.cat(encoded).to(torch.float16).numpy())
    return torch.from_numpy(np.load(path))


def train_base(folder: Path) -> None:
    """Trains denoiser and text encoder on, from the shipped weights."""
    pipeline = shipped()
    latents = latents_of_drawings(pipeline, folder)
    alphas = pipeline.scheduler.alphas_cumprod.clamp(0, 1)
    unet, text_encoder = pipeline.unet.requires_grad_(True), pipeline.text_encoder.requires_grad_(True)
    # For so few tokens plain matrix products are much faster on a CPU than the fused attention kernels.
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")

    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        clean = latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = sample_timesteps(BATCH, generator)
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        confused = step >= CONFUSED_FROM * STEPS
        tokens = pipeline.tokenizer(
            [training_caption(row, confused, generator) for row in rows.tolist()],
            **{"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"},
        ).input_ids
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not confused):  # words stay as distinct as before, only their drawings mix
                context = text_encoder(tokens).last_hidden_state
            velocity = unet(signal * clean + spread * noise, timesteps, context).sample
        return functional.mse_loss(velocity.float(), signal * noise - spread * clean)

    settings = LoopSettings(STEPS, learning_rate=4e-4, warmup_steps=50, average_decay=0.998, checkpoint_every=100)
    train(nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}), loss_function, settings, folder)


def base(name: str, folder: Path) -> StableDiffusionPipeline:
    """One of ``BASES``."""
    pipeline = shipped()
    if name == BASES[1]:
        parts = nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
        parts.requires_grad_(True)
        load_averaged_weights(parts, folder)
        parts.requires_grad_(False).eval()
    return pipeline


def split_caption(usual: str, caption: str, split: str) -> Prompt:
    """A prompt with the stage prompts of one split.

    Args:
        usual: the usual caption.
        caption: what the user wrote, usual or long.
        split: ``alone`` names every attribute in its own stage only; ``growing`` and ``contrast`` are the rules.
    """
    attributes = tiny_shapes.parse_caption(usual)
    if split == "plain":
        return Prompt(caption)
    if split == "alone":
        told = [
            {name: value for name, value in attributes.items() if tiny_shapes.SCALES[name] == scale} for scale in SCALES
        ]
        return Prompt(caption, stages=tuple(map(tiny_shapes.describe, told)))
    return Prompt(caption, stages=decompose_by_rules(caption))


def measure(folder: Path, images: int, bases: list[str]) -> list[dict[str, Any]]:
    """The held-out judge's opinion of every attribute, for all bases, captions and splits."""
    heldout = HeldoutRewards([TinyShapesJudgeReward("heldout", name) for name in tiny_shapes.ATTRIBUTES])
    knobs, stages = ChainArguments(num_inference_steps=10, eta=0.0, guidance_scale=4.0), make_stages()
    prompts, seeds = prompts_and_seeds(as_prompts(tiny_shapes.prompts("test")), images, 0)
    orders = [np.random.default_rng([1, i]).permutation(list(tiny_shapes.ATTRIBUTES)).tolist() for i in range(images)]
    rows = []
    for name in bases:
        pipeline = base(name, folder)
        for kind in CAPTIONS:
            for split in SPLITS:
                form = as_contrast if split == "contrast" else None
                chain = DenoisingChain(pipeline, knobs, stages=stages, stage_form=form)
                told = [
                    prompt.text if kind == "usual" else long_caption(tiny_shapes.parse_caption(prompt.text), order)
                    for prompt, order in zip(prompts, orders, strict=True)
                ]
                staged = [split_caption(p.text, text, split) for p, text in zip(prompts, told, strict=True)]
                found = evaluate(partial(render, chain), staged, seeds, {"heldout": heldout}, 32)
                shares = {key.split("/")[-1]: values for key, values in found.info.items() if key.count("/") == 2}
                means = {key: round(float(values.mean()), 4) for key, values in shares.items()}
                product = torch.stack([torch.as_tensor(values) for values in shares.values()]).prod(0)
                row = {"base": name, "caption": kind, "split": split, **means, "all": round(float(product.mean()), 4)}
                row["all_standard_error"] = round(float(product.std() / images**0.5), 4)
                rows.append(row | {"example": staged[0].stages or [staged[0].text]})
                print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    names = [*tiny_shapes.ATTRIBUTES, "all"]
    lines = [f"| base | caption | split | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        numbers = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['base']} | {row['caption']} | {row['split']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("train", "measure"), required=True)
    parser.add_argument("--folder", type=Path, default=Path("outputs/dcot_bases"))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES, help="those to measure")
    parser.add_argument("--images", type=int, default=128, help="of every row")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "train":
        train_base(arguments.folder)
        return
    rows = measure(arguments.folder, arguments.images, arguments.bases)
    settings = {"images": arguments.images, "tokens": TOKENS, "steps_of_training": STEPS, "drawings": DRAWINGS}
    print(write_results("dcot_bases", {"settings": settings, "rows": rows}))
    print(table(rows))


if __name__ == "__main__":
    main()
