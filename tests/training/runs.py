"""Runs of the training script on a tiny base, in a process of their own or in this one."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import train_rlr_lora
from rlr_peft.build import Run, build_run
from rlr_peft.config import load_config
from rlr_peft.training import Progress, train
from tests.programs import Program

WEIGHTS = "pytorch_lora_weights.safetensors"


def config_file(workplace: Path, output_dir: Path, reward: str = "redness", **values: object) -> Path:
    """Writes a config of a short run beside its output folder."""
    config = {
        "pretrained_model_name_or_path": str(workplace / "base"),
        "prompt_path": str(workplace / "prompts.txt"),
        "reward_fn": f"{workplace / 'rewards.py'}:{reward}",
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "estimator": "rlr",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_images_per_prompt": 2,
        "calibration_samples": 4,
        "learning_rate": 0.01,
        "report_to": "none",
        "skip_final_inference": True,
        "output_dir": str(output_dir),
        **values,
    }
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def build(config: Path, *flags: str) -> Run:
    """What the script builds, in this process; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return build_run(load_config(["--config", str(config), *flags]))


def train_here(config: Path, *flags: str) -> tuple[Run, Progress]:
    """The script's training, in this process."""
    run = build(config, *flags)
    return run, train(run)


def run_script(monkeypatch: pytest.MonkeyPatch, config: Path, *flags: str) -> None:
    """The script's own ``main``, in this process."""
    monkeypatch.setattr(sys, "argv", ["train_rlr_lora.py", "--config", str(config), *flags])
    with torch.random.fork_rng(devices=[]):
        assert train_rlr_lora.main() == 0


def start(config: Path, *flags: str, **environment: str) -> Program:
    """Starts the script in a process of its own, whose environment has these besides this one's."""
    return Program(
        ["train_rlr_lora.py", "--config", config, *flags], os.environ | environment, stderr=subprocess.STDOUT
    )


def finish(process: Program, expected_code: int = 0) -> str:
    """Waits for the script's end; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected_code, output
    return output


def of_two_processes() -> list[dict[str, str]]:
    """The environment of each, as `torchrun` sets it."""
    with socket.create_server(("127.0.0.1", 0)) as ports:
        port = str(ports.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    return [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def run_on_two_processes(config: Path) -> None:
    """Runs the script on two CPU processes."""
    for process in [start(config, **environment) for environment in of_two_processes()]:
        finish(process)


def wait_for(path: Path, process: Program) -> None:
    """Waits until the file is there; the process must live on until then."""
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
