"""`rlr-peft merge`: the merged pipeline draws what base and adapter draw, and holds no LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from rlr_peft.cli.main import main
from rlr_peft.lora import load_lora, save_lora
from tests.families.image_pipelines import pixart_sigma
from tests.pipelines import tiny_stable_diffusion
from tests.test_kohya import ATTENTION, adapt, draw

CASES = {
    "alpha": (tiny_stable_diffusion, "unet", {"lora_alpha": 8.0, "target_modules": [*ATTENTION, "conv1"]}),
    "DoRA": (tiny_stable_diffusion, "unet", {"use_dora": True}),
    "without a loader": (pixart_sigma, "transformer", {"target_modules": ["attn1.to_q", "attn2.to_v"]}),
}


def merge(tmp_path: Path, *words: str, base: str = "base") -> int:
    names = {"base": base, "adapter": "adapter", "output": "out"}
    return main(["merge", *(f"--{flag}={tmp_path / name}" for flag, name in names.items()), *words])


def make_folders(tmp_path: Path, case: str) -> None:
    make, denoiser, arguments = CASES[case]
    make().save_pretrained(tmp_path / "base")
    save_lora(adapt(load(tmp_path / "base"), denoiser, **arguments), tmp_path / "adapter")


def load(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES)
def test_it_draws_what_base_and_adapter_draw(tmp_path: Path, case: str) -> None:
    make_folders(tmp_path, case)
    assert merge(tmp_path) == 0
    reference, merged = load(tmp_path / "base"), load(tmp_path / "out")
    base = draw(reference)
    load_lora(reference, tmp_path / "adapter")
    expected = draw(reference)
    torch.testing.assert_close(draw(merged), expected, rtol=0, atol=2e-5)
    assert (base - expected).abs().max() > 1e-3
    names = [name for path in (tmp_path / "out").rglob("*.safetensors") for name in load_file(path)]
    assert names and not [name for name in names if "lora" in name or "base_layer" in name]
    assert not list(tmp_path.glob(".merging-*"))


def test_half_precision_and_a_folder_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folders(tmp_path, "alpha")
    assert merge(tmp_path, "--dtype", "bf16") == 0
    (unet,) = (tmp_path / "out" / "unet").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(unet).values()} == {torch.bfloat16}
    assert merge(tmp_path) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folders(tmp_path, "without a loader")
    tiny_stable_diffusion().save_pretrained(tmp_path / "base2")
    with pytest.raises(SystemExit):
        merge(tmp_path, base="base2")
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()
