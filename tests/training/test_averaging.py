"""The moving average of the adapter: evaluated, saved and resumed, while the weights themselves go on training."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlr_peft.build import averaged, build_ema
from rlr_peft.config import OptimizerArguments
from rlr_peft.lora import lora_parameters
from rlr_peft.training import CheckpointError, finish, resume
from tests.training.runs import WEIGHTS, build, config_file, train_here

VALUES = {"estimator": "full-bp", "checkpointing_steps": 1, "max_train_steps": 2, "num_inference_steps": 2}


def test_the_average_follows_its_formula_and_the_weights_come_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = build_ema([parameter], OptimizerArguments(use_ema=True, ema_decay=0.22))
    assert ema is not None and build_ema([parameter], OptimizerArguments()) is None
    values = []
    for step in range(1, 4):
        parameter.data.fill_(float(step))
        ema.step([parameter])
        with averaged(ema, [parameter]):
            values.append(parameter.item())
        assert parameter.item() == step
    second = 2 / 11 * 1 + 9 / 11 * 2  # N / (9 + N) is below the decay there; the first average is the weight itself
    assert values == pytest.approx([1, second, 0.22 * second + 0.78 * 3])


def trained(folder: Path) -> dict[str, Tensor]:
    return {name.replace(".default", ""): v for name, v in torch.load(folder / "lora.pt", weights_only=True).items()}


def saved(folder: Path) -> dict[str, Tensor]:
    return {name.removeprefix("unet."): value for name, value in load_file(folder / WEIGHTS).items()}


def test_the_average_is_saved_and_resumed_and_training_does_not_notice(workplace: Path, tmp_path: Path) -> None:
    plain, mean, parts = (config_file(workplace, tmp_path / name, **VALUES) for name in ("plain", "mean", "parts"))
    train_here(plain)
    run, progress = train_here(mean, "--use_ema")
    last = tmp_path / "mean" / "checkpoint-2"
    assert (last / "lora.pt").read_bytes() == (tmp_path / "plain" / "checkpoint-2" / "lora.pt").read_bytes()
    first, second = trained(tmp_path / "mean" / "checkpoint-1"), trained(last)
    for name, tensor in saved(last).items():
        torch.testing.assert_close(tensor, 2 / 11 * first[name] + 9 / 11 * second[name], rtol=1e-5, atol=1e-7)

    shutil.copytree(tmp_path / "mean" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    train_here(parts, "--use_ema", "--resume_from_checkpoint", "latest")
    for file in (WEIGHTS, "lora.pt", "ema.pt", "optimizer.pt"):
        assert (tmp_path / "parts" / "checkpoint-2" / file).read_bytes() == (last / file).read_bytes()

    finish(run, progress, None)  # it ends with an error if the pipeline drew other images than the saved adapter
    assert (tmp_path / "mean" / WEIGHTS).read_bytes() == (last / WEIGHTS).read_bytes()
    for name, parameter in lora_parameters(run.chain.denoiser).items():
        assert torch.equal(parameter, second[name.replace(".default", "")]), "training could go on"
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "an exponential moving average of the trained weights with decay 0.995" in card

    for config, flag, words in (
        (plain, "true", "true, got .* use_ema false"),
        (mean, "false", "false, .* use_ema true"),
    ):
        with pytest.raises(CheckpointError, match=f"of use_ema {words}"):
            resume(build(config, "--use_ema", flag, "--resume_from_checkpoint", "latest"))
