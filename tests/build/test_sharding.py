"""A denoiser that is shared out over two real processes trains as one that each process holds."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, safe_open
from torch.testing import assert_close

from rlr_peft import Trainer
from rlr_peft.build import blocks_of, build_run
from rlr_peft.config import ConfigError, load_config
from tests.families.image_pipelines import sdxl
from tests.families.table import CASES, NUM_STEPS
from tests.families.video_pipelines import text_to_video_sd
from tests.programs import Program
from tests.training.runs import WEIGHTS, of_two_processes, train_here

# Eight blocks, each with a frozen and a trained layer, and a context that passes through.
BLOCKS = """
import gc, os, sys
import torch
from accelerate import Accelerator
from rlr_peft import Trainer
from rlr_peft.build.processes import Processes
from rlr_peft.build.reporting import set_up_logging
from rlr_peft.build.sharding import ShardedDenoisers, sharded_bytes
from rlr_peft.config import load_config


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.trained = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64)
        self.frozen.requires_grad_(False)

    def forward(self, hidden, context):
        largest[0] = max(largest[0], tensor_bytes())
        return torch.tanh(self.frozen(hidden + context)) + self.trained(hidden), context


class Denoiser(torch.nn.Module):
    _no_split_modules, _repeated_blocks = ["Block"], []

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(8))

    def forward(self, hidden, context):
        for block in self.blocks:
            hidden, context = block(hidden, context)
        return hidden.square().sum()


def tensor_bytes():
    kinds = (torch.Tensor, torch.nn.Parameter)
    storages = [tensor.untyped_storage() for tensor in gc.get_objects() if type(tensor) in kinds]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


set_up_logging()
rank, largest = int(os.environ["RANK"]), [0]
processes = Processes(Accelerator(cpu=True))
before = tensor_bytes()
torch.manual_seed(0)
model = Denoiser()
inputs = [torch.randn(2, 64).requires_grad_() for _ in range(2)]
trained = [p for p in model.parameters() if p.requires_grad]
whole = torch.autograd.grad(model(*inputs), [*trained, *inputs])
frozen, rest = 8 * 64 * 64 * 4, tensor_bytes() - before - 8 * 64 * 64 * 4
assert sharded_bytes(model, 2) == (frozen, frozen / 2, frozen / 8), "what a plan counts"
sharded = ShardedDenoisers({"blocks": model}, torch.device("cpu"), processes)
assert tensor_bytes() - before - rest == frozen / 2
largest[0] = 0
for number in range(1 + 2 * rank):  # the processes do not call it equally often
    again = torch.autograd.grad(model(*inputs), [*trained, *inputs])
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    del again
    with torch.no_grad():
        model(*inputs)
assert processes.gather_objects([rank], "the ranks") == [0, 1]
assert frozen / 8 <= largest[0] - before - rest - frozen / 2 < 2 * frozen / 8, "one block at a time"
"""

TRAINING = """
for config in sys.argv[1:]:
    trainer = Trainer(config=load_config(["--config", config]))
    trainer.train()
    if trainer.run.evaluation_prompts:
        assert trainer.save()["n"] == 3
    trainer.run.processes.close()
"""


def config_of(family: str, place: Path, output: str, **values: object) -> Path:
    base = place / family
    if not base.exists():
        CASES[family].build().save_pretrained(base)
    (place / "prompts.txt").write_text("red ball\nblue box\n")
    (place / "rewards.py").write_text(
        "def redness(images, prompts):\n    return 100 * images[:, 0].flatten(1).mean(1)\n"
    )
    config = {
        "pretrained_model_name_or_path": str(base),
        "prompt_path": str(place / "prompts.txt"),
        "reward_fn": f"{place / 'rewards.py'}:redness",
        "num_inference_steps": NUM_STEPS,
        "estimator": "rlr",
        "calibration_samples": 2,
        "train_batch_size": 2,
        "num_images_per_prompt": 2,
        "learning_rate": 0.01,
        "adam_epsilon": 0.01,
        "report_to": "none",
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "skip_final_inference": True,
        "output_dir": str(place / output),
        **CASES[family].options,
        **values,
    }
    path = (place / output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def test_two_processes_that_share_the_denoiser_train_as_one_that_holds_it(tmp_path: Path) -> None:
    """A tiny FLUX by `rlr`, whose samples are walked back a random number of steps, and a tiny SDXL with recomputed
    activations. Both draw a share of the images; the main one proves the adapter. Checkpoints go from one to two and
    back."""
    evaluated = {
        "evaluation_prompt_path": str(tmp_path / "prompts.txt"),
        "num_evaluation_images": 3,
        "evaluation_batch_size": 1,
        "validation_prompt": ["red sky", "sea", "sun"],
        "num_validation_images": 1,
        "validation_steps": 2,
    }
    configs = [
        config_of("flux", tmp_path, "flux-sharded", shard_denoiser=True, **evaluated),
        config_of("flux", tmp_path, "flux-whole"),
    ]
    accumulated = {"gradient_accumulation_steps": 2}
    train_here(config_of("sdxl", tmp_path, "sdxl-one", **accumulated))
    options = {"gradient_checkpointing": True, "resume_from_checkpoint": str(tmp_path / "sdxl-one" / "checkpoint-1")}
    configs.append(config_of("sdxl", tmp_path, "sdxl-resumed", shard_denoiser=True, **options))
    words = ["-c", BLOCKS + TRAINING, *configs]
    processes = [Program(words, os.environ | process) for process in of_two_processes()]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for name, share in (("transformer", 0.69), ("unet", 0.89)):  # of their weights are in blocks
        held, frozen = re.findall(rf"{name}: each process holds ([\d.e-]+) of ([\d.e-]+) GiB", said[0][1])[0]
        assert float(held) / float(frozen) == pytest.approx(1 - share / 2, abs=0.02)
    assert "written by 1 processes and this run has 2" in said[0][1]
    assert "draws the same images bit for bit" in said[0][1]

    def adapter(folder: str) -> Path:
        return tmp_path / folder / "checkpoint-2" / WEIGHTS

    assert adapter("flux-sharded").read_bytes() == adapter("flux-whole").read_bytes()
    assert (tmp_path / "flux-sharded" / WEIGHTS).read_bytes() == adapter("flux-whole").read_bytes()

    config = config_of("flux", tmp_path, "flux-one", **accumulated, **evaluated)
    with torch.random.fork_rng(devices=[]):
        alone = Trainer(config=load_config(["--config", str(config)]))
        alone.train()
        here = alone.save()
    there = json.loads((tmp_path / "flux-sharded" / "metrics.json").read_text())
    assert there["kl_n"] == here["kl_n"] == 2 and there["reward_before"] == here["reward_before"]
    for name in ("reward_after", "reward_gain", "kl"):
        assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-3)
    for name in ("step-000000.png", "step-000000.json"):
        drawn = [(tmp_path / folder / "validation" / name).read_bytes() for folder in ("flux-one", "flux-sharded")]
        assert drawn[0] == drawn[1]

    (tmp_path / "flux-resumed").mkdir()
    shutil.copytree(tmp_path / "flux-sharded" / "checkpoint-1", tmp_path / "flux-resumed" / "checkpoint-1")
    train_here(config_of("flux", tmp_path, "flux-resumed", resume_from_checkpoint="latest", **accumulated))
    for expected, other in (("flux-one", "flux-sharded"), ("flux-one", "flux-resumed"), ("sdxl-one", "sdxl-resumed")):
        one, two = load_file(adapter(expected)), load_file(adapter(other))
        start = load_file(tmp_path / expected / "checkpoint-1" / WEIGHTS)
        assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one), "something is learnt"
        for name in one:
            assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
        with safe_open(adapter(expected), "pt") as here, safe_open(adapter(other), "pt") as there:
            assert here.metadata() == there.metadata()


def test_blocks_are_the_smallest_that_diffusers_names() -> None:
    unet = sdxl().unet.requires_grad_(False)
    kinds = {type(block).__name__ for block in blocks_of(unet)}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    inside = sum(p.numel() for block in blocks_of(unet) for p in block.parameters())
    assert inside > 0.7 * sum(p.numel() for p in unet.parameters())
    with pytest.raises(ValueError, match="diffusers names the blocks, got UNet3DConditionModel; leave"):
        blocks_of(text_to_video_sd().unet.requires_grad_(False))


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(ConfigError, match="expected several processes that share the denoiser, got one"):
        build_run(load_config(["--config", "tiny_shapes", "--shard_denoiser", "true"]))
