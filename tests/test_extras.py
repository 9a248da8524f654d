"""What a plain install leaves out is asked for in one sentence that names the extra."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rlr_peft.build import build_optimizer, build_run, pipeline_quantization
from rlr_peft.config import ModelArguments, OptimizerArguments, load_config
from rlr_peft.errors import UserError
from rlr_peft.prompts import Columns, DatasetSpec, dataset_rows
from rlr_peft.rewards import load_reward


def tracked() -> None:
    build_run(load_config(["--config", "tiny_shapes", "--report_to", "tensorboard"]))


def quantized() -> None:
    arguments = ModelArguments(pretrained_model_name_or_path="x", bnb_quantization_config_path="nf4")
    pipeline_quantization(arguments, torch.bfloat16)


def with_8bit_adam() -> None:
    build_optimizer([nn.Parameter(torch.zeros(1))], OptimizerArguments(use_8bit_adam=True))


def from_a_dataset() -> None:
    next(dataset_rows(DatasetSpec("owner/name"), Columns("text")))


@pytest.mark.parametrize(
    ("module", "extra", "option", "use"),
    [
        ("tensorboard", "tensorboard", "--report_to tensorboard", tracked),
        ("bitsandbytes", "quantization", "--bnb_quantization_config_path", quantized),
        ("bitsandbytes.optim", "quantization", "--use_8bit_adam", with_8bit_adam),
        ("datasets", "datasets", "a dataset of prompts", from_a_dataset),
        ("rapidocr", "ocr", "--reward_fn ocr", lambda: load_reward("ocr")),
    ],
)
def test_the_sentence(
    module: str, extra: str, option: str, use: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UserError) as told:
        use()
    assert str(told.value).startswith(f"{option}: expected the package {module}")
    assert f"pip install 'rlr-peft[{extra}]'" in str(told.value)
