"""The build script at toy size: runs, resumes bit for bit and exports a pipeline that loads."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from benchmarks.tiny_shapes.build import build, parse_arguments
from benchmarks.tiny_shapes.loop import LoopSettings, train
from rlr_peft.rewards import JUDGE_NAMES, create_judge, judge_file

TOY = [
    *("--drawings", "24", "--processes", "1", "--log_every", "1", "--checkpoint_every", "100"),
    *("--vae_steps", "2", "--vae_batch_size", "2", "--judge_steps", "2", "--judge_batch_size", "8"),
    *("--unet_steps", "2", "--unet_batch_size", "2"),
]


def run_build(work_dir: Path, *flags: str) -> None:
    """Build everything at toy size with the package folder inside ``work_dir``."""
    build(parse_arguments([*TOY, "--work_dir", str(work_dir), "--package_dir", str(work_dir / "package"), *flags]))


def exported_weights(work_dir: Path) -> dict[str, torch.Tensor]:
    """All exported tensors by file and name."""
    files = sorted((work_dir / "package").rglob("*.safetensors"))
    return {f"{file.parent.name}/{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def test_interrupted_build_ends_in_the_same_weights_and_loads(tmp_path: Path) -> None:
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    run_build(straight)
    for _ in range(5):  # autoencoder, two judges and denoiser are each cut once
        run_build(interrupted, "--stop_after", "1")
    expected, found = exported_weights(straight), exported_weights(interrupted)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    for name in JUDGE_NAMES:
        create_judge(name).load_state_dict(load_file(judge_file(name, straight / "package" / "judges")))
    pipeline = StableDiffusionPipeline.from_pretrained(straight / "package" / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red star", num_inference_steps=2, output_type="np").images[0].shape == (64, 64, 3)
    assert (straight / "wall_times.jsonl").read_text().count('"finished": true') == 6
    record = json.loads((straight / "package" / "build_record.json").read_text())
    assert {name: effort["steps"] for name, effort in record.items()} == {
        "vae": 2,
        "judge_heldout": 2,
        "judge_reward": 2,
        "unet": 2,
    }
    leftovers = [file.name for file in tmp_path.rglob("*") if "unfinished" in file.name or file.name.endswith(".old")]
    assert not leftovers


def test_killed_checkpoint_write_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_function(step: int, generator: torch.Generator) -> torch.Tensor:
        return module(torch.randn(2, 3, generator=generator)).square().mean()

    module = torch.nn.Linear(3, 1)
    settings = LoopSettings(steps=6, learning_rate=0.1, warmup_steps=1, checkpoint_every=2, log_every=2)
    train(module, loss_function, LoopSettings(**{**vars(settings), "stop_after": 2}), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def broken_save(state: object, file: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken_save)
        with pytest.raises(KeyboardInterrupt):
            train(module, loss_function, settings, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert train(module, loss_function, settings, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6
