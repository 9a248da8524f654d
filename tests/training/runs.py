"""Runs of the training script on a tiny base, in a process of their own or in this one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from rlr_peft.build.run import Run, build_run
from rlr_peft.config import load_config
from rlr_peft.training.progress import Progress
from rlr_peft.training.trainer import train

ROOT = Path(__file__).parents[2]
WEIGHTS = "pytorch_lora_weights.safetensors"


def config_file(workplace: Path, output_dir: Path, reward: str = "redness", **values: object) -> Path:
    """Writes a config of a short run beside its output folder."""
    config = {
        "pretrained_model_name_or_path": str(workplace / "base"),
        "prompt_path": str(workplace / "prompts.txt"),
        "reward_fn": f"{workplace / 'rewards.py'}:{reward}",
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
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


def start(config: Path, *flags: str) -> subprocess.Popen[str]:
    """Starts the script in a process of its own."""
    command = [sys.executable, str(ROOT / "train_rlr_lora.py"), "--config", str(config), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str], expected_code: int = 0) -> str:
    """Waits for the script's end; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected_code, output
    return output


def run_on_two_processes(config: Path) -> None:
    """Runs the script on two CPU processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train_rlr_lora.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
    subprocess.run([*command, "--config", str(config)], cwd=ROOT, check=True, env=environment)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Waits until the file is there; the process must live on until then."""
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
