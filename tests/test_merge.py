"""`rlr-peft merge`: the merged pipeline draws what base and adapter draw, and holds no LoRA."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlr_peft.cli import main
from rlr_peft.lora import WEIGHT_NAME, load_lora, save_lora
from rlr_peft.publishing import Base, Merged, Rewards, RunRecord, StoredCard, save_stored_card, write_merged_card
from tests.families.image_pipelines import pixart_sigma
from tests.pipelines import tiny_stable_diffusion
from tests.test_export import ATTENTION, adapt, draw

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


def test_the_base_is_that_of_the_run_beside_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folders(tmp_path, "alpha")
    words = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and capsys.readouterr().err.endswith("adapter does not say it; give --base.\n")
    (tmp_path / "adapter" / "config.yaml").write_text(f"pretrained_model_name_or_path: {tmp_path / 'base'}\n")
    assert main(words) == 0
    assert f"The base is {tmp_path / 'base'}, that of the adapter's run" in capsys.readouterr().out
    assert merge(tmp_path, f"--output={tmp_path / 'same'}") == 0
    weights = [load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("out", "same")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_half_precision_and_a_folder_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folders(tmp_path, "alpha")
    assert merge(tmp_path, "--dtype", "bf16") == 0
    (unet,) = (tmp_path / "out" / "unet").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(unet).values()} == {torch.bfloat16}
    with pytest.raises(SystemExit) as left:
        merge(tmp_path)
    assert left.value.code == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_the_card_tells_what_was_merged_and_its_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(tmp_path, "alpha")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    save_stored_card(tmp_path / "adapter", StoredCard(RunRecord(Base("base"), Rewards("redness"), {})))
    assert merge(tmp_path, "--dtype", "bf16") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "creativeml-openrail-m" and data["pipeline_tag"] == "text-to-image"
    assert "stable-diffusion" in data["tags"] and "base_model" not in data, "a folder is no model of the Hub"
    text = " ".join(card.text.split())
    assert "pipeline `base` with the LoRA adapter `adapter` added to the weights of its unet" in text
    assert "trained on the reward `redness`" in text and "then rounded to bfloat16" in text
    assert str(tmp_path) not in card.content
    monkeypatch.chdir(tmp_path / "out")
    scope: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)[0], scope)
    assert scope["pipe"].unet.dtype == torch.bfloat16


def test_the_card_of_hub_repositories_links_them(tmp_path: Path) -> None:
    facts = Merged(
        "Qwen/Qwen-Image", None, "me/my-lora", "v2", ["transformer"], "float32", "text-to-image", ["qwen-image"]
    )
    card = ModelCard.load(write_merged_card(tmp_path, facts))
    assert card.data.to_dict()["base_model"] == ["Qwen/Qwen-Image", "me/my-lora"]
    assert card.data.to_dict()["base_model_relation"] == "merge" and card.data.license == "apache-2.0"
    assert (
        "[me/my-lora](https://huggingface.co/me/my-lora) at `v2`" in card.text
        and "rounded" not in card.text.split("##")[0]
    )


def test_an_adapter_that_fits_only_in_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers passes over layers that the base does not have; half an adapter would be fused without a word."""
    make_folders(tmp_path, "alpha")
    file = tmp_path / "adapter" / WEIGHT_NAME
    tensors = load_file(file)
    names = [next(name for name in tensors if part in name) for part in ("lora_A", "lora_B")]
    stray = {f"unet.nowhere.to_q.{name[name.index('lora_') :]}": tensors[name].clone() for name in names}
    save_file(tensors | stray, file, metadata=safe_open(file, "pt").metadata())
    with pytest.raises(SystemExit):
        merge(tmp_path)
    assert "does not fit the base" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folders(tmp_path, "without a loader")
    tiny_stable_diffusion().save_pretrained(tmp_path / "base2")
    with pytest.raises(SystemExit):
        merge(tmp_path, base="base2")
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()
