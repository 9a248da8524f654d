"""Exports: the pipeline folder and the judges, in fp16, each replaced as a whole."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from benchmarks.tiny_shapes.autoencoder import finished_vae
from benchmarks.tiny_shapes.denoiser import create_scheduler, finished_denoiser
from benchmarks.tiny_shapes.judges import finished_judge
from benchmarks.tiny_shapes.loop import training_effort
from benchmarks.tiny_shapes.text import create_tokenizer, write_legacy_tokenizer_files
from rlr_peft.rewards import JUDGE_NAMES, judge_file

_TEXT_PREFIX = "text_model."


def export_all(drawings_path: Path, work_dir: Path, package_dir: Path) -> None:
    """Export whatever has a checkpoint: ``package_dir/judges`` and, once the denoiser has one, ``.../pipeline``.

    ``package_dir/build_record.json`` says how many steps and seconds went into each of them.
    """
    package_dir.mkdir(parents=True, exist_ok=True)
    for name in JUDGE_NAMES:
        folder = work_dir / f"judge_{name}"
        if (folder / "checkpoint.pt").exists():
            weights = {
                key: value.half().contiguous() for key, value in finished_judge(name, folder).state_dict().items()
            }
            target = judge_file(name, package_dir / "judges")
            target.parent.mkdir(exist_ok=True)
            save_file(weights, target.with_suffix(".unfinished"))
            target.with_suffix(".unfinished").replace(target)
    if (work_dir / "unet" / "checkpoint.pt").exists():
        export_pipeline(drawings_path, work_dir, package_dir / "pipeline")
    efforts = {file.parent.name: training_effort(file.parent) for file in sorted(work_dir.glob("*/checkpoint.pt"))}
    (package_dir / "build_record.json").write_text(json.dumps(efforts, indent=2) + "\n", encoding="utf-8")


def export_pipeline(drawings_path: Path, work_dir: Path, folder: Path) -> None:
    """Write the pipeline from the newest checkpoints to ``folder``, replacing an older one in one go."""
    unet, text_encoder = finished_denoiser(work_dir / "unet")
    tokenizer = create_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=finished_vae(drawings_path, work_dir / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=create_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    unfinished, old = folder.with_name(folder.name + ".unfinished"), folder.with_name(folder.name + ".old")
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(unfinished)
    write_legacy_tokenizer_files(unfinished / "tokenizer")
    _rename_text_weights(unfinished / "text_encoder" / "model.safetensors")
    _load_text_encoder_in_float32(unfinished / "text_encoder" / "config.json")
    _forget_paths(unfinished)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _rename_text_weights(file: Path) -> None:
    """Name the weights as transformers 4 does; 5 reads both, while 4 would silently start from random weights."""
    weights = {
        key if key.startswith(_TEXT_PREFIX) else _TEXT_PREFIX + key: value for key, value in load_file(file).items()
    }
    # The tensors just read may still be views of the file, so it must not be written in place.
    renamed = file.with_suffix(".renamed")
    save_file(weights, renamed, metadata={"format": "pt"})
    renamed.replace(file)


def _load_text_encoder_in_float32(file: Path) -> None:
    """Ask for float32 where no dtype is given, as diffusers does for the other parts; transformers would keep fp16."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _forget_paths(folder: Path) -> None:
    """Drop ``_name_or_path`` from the configurations: it would name a folder of the machine that built them."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
