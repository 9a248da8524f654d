"""A base that is none: what it is and what to do, in one sentence, before anything of it is loaded or run."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlr_peft.build import load_pipeline
from rlr_peft.chain import BaseModelError, read_model_index
from rlr_peft.config import ModelArguments
from rlr_peft.plan import find_architecture
from tests.pipelines import tiny_stable_diffusion

UNET = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def load(place: Any, **options: Any) -> Any:
    return load_pipeline(ModelArguments(pretrained_model_name_or_path=str(place), **options), torch.device("cpu"))


def index(**changes: Any) -> Callable[[Path], None]:
    """Changes `model_index.json`; None takes the name out."""

    def change(base: Path) -> None:
        values = json.loads((base / "model_index.json").read_text()) | changes
        kept = {name: value for name, value in values.items() if value is not None}
        (base / "model_index.json").write_text(json.dumps(kept))

    return change


def text(content: str) -> Callable[[Path], None]:
    return lambda base: (base / "model_index.json").write_text(content) and None


INDICES = {
    "a list": (text("[1, 2]"), "expected model_index.json to be a mapping, got list"),
    "a number": (text("7"), "a mapping, got int"),
    "no JSON": (text("{"), "model_index.json cannot be read: line 1, column 2: not valid JSON"),
    "too deep": (text("[" * 100_000), "model_index.json cannot be read: nested deeper than 20 levels"),
    "no class": (index(_class_name=None), "expected a pipeline class of diffusers .* got None"),
    "unknown class": (index(_class_name="NoSuchPipeline"), "got 'NoSuchPipeline'; correct the file or upgrade"),
    "no chain": (
        index(_class_name="SanaSprintPipeline"),
        "SanaSprintPipeline cannot .* a consistency model.*SanaPipeline",
    ),
    "no prompt": (
        index(_class_name="DDPMPipeline"),
        "DDPMPipeline cannot be driven as a chain: its call takes no `prom",
    ),
    "code of a pipeline": (index(_class_name=["own", "Own"]), "a pipeline class of its own code, which is not run"),
    "code of a part": (index(unet=["own", "Own"]), "its unet from own.Own, code that is .* not run"),
    "any module": (index(unet=["os", "system"]), "its unet from os.system, code that is .* not run"),
    "unknown part": (index(unet=["diffusers", "NoUNet"]), "needs diffusers.NoUNet for its unet, which the installed"),
    "half a part": (index(unet=["diffusers"]), r"expected \[library, class\] for unet .* got \['diffusers'\]"),
    "a mapping as part": (index(unet={"a": 1}), r"expected \[library, class\] for unet"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_cannot_be_followed(name: str, base: Path) -> None:
    change, expected = INDICES[name]
    change(base)
    for own in (base / "own.py", base / "unet" / "own.py"):
        own.write_text(f"open({str(base / 'executed')!r}, 'w')\n")
    for read in (load, lambda place: find_architecture(str(place))):
        with pytest.raises(BaseModelError, match=expected):
            read(base)
    assert not (base / "executed").exists()


def test_a_place_that_is_no_pipeline(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"unet.to_q.lora_A.weight": torch.zeros(2, 2)}
    for place in ("adapter", "checkpoint-5", "singles", "above", "empty"):
        (tmp_path / place).mkdir()
    save_file(lora, tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    save_file(lora, tmp_path / "checkpoint-5" / "pytorch_lora_weights.safetensors")
    save_file({"model.x": torch.zeros(1)}, tmp_path / "singles" / "v1-5.safetensors")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({}))
    (tmp_path / "note.txt").write_text("hello")
    shutil.copytree(base, tmp_path / "above" / "inner")
    for place, expected in (
        ("singles/v1-5.safetensors", r"is a single file: .*from_single_file\(FILE\).save_pretrained\(FOLDER\)"),
        ("old.ckpt", "is a single file"),
        ("adapter/pytorch_lora_weights.safetensors", "is a LoRA adapter: expected the pipeline that it was trained on"),
        ("note.txt", "is a file: expected the folder or Hub id"),
        ("empty", "is an empty folder"),
        ("adapter", "holds a LoRA adapter"),
        ("checkpoint-5", "holds a checkpoint of a training run"),
        ("singles", r"holds single files \(v1-5.safetensors\)"),
        ("above", f"one level down: give {tmp_path / 'above' / 'inner'}"),
        ("base/unet", "holds one model, not a whole pipeline"),
        ("nowhere/at/all", "no such folder"),
    ):
        with pytest.raises(BaseModelError, match=expected):
            read_model_index(str(tmp_path / place))
    with pytest.raises(BaseModelError, match="not in the local cache, and the Hub cannot be reached or HF_HUB_OFFLINE"):
        read_model_index("stable-diffusion-v1-5/stable-difusion")


class Executed:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(("part", "name"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
def test_pickles_give_tensors_or_nothing(part: str, name: str, base: Path) -> None:
    (weights,) = (base / part).glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    pickled = base / part / f"{name}.bin"
    torch.save(tensors, pickled)
    loaded = getattr(load(base), part).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items() if key in loaded)
    torch.save({"a": Executed(base / "executed")}, pickled)
    with pytest.raises(
        BaseModelError, match=r"a pickle that holds more than tensors and could run code.*safetensors\."
    ):
        load(base)
    assert not (base / "executed").exists()


def test_weights_that_are_not_there_or_not_whole(base: Path) -> None:
    file = base / f"{UNET}.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if key != "conv_in.bias"}, file)
    with pytest.raises(BaseModelError, match=r"lacks 1 tensors of its unet, the first is conv_in.bias"):
        load(base)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(BaseModelError, match="a file of weights is damaged"):
        load(base)
    file.rename(base / f"{UNET}.fp16.safetensors")
    with pytest.raises(BaseModelError, match=r"weights of the variant fp16 only: give --variant fp16\."):
        load(base)
    save_file(tensors, base / f"{UNET}.fp16.safetensors")
    assert load(base, variant="fp16").unet.conv_in.bias is not None
    save_file(tensors, file)
    with pytest.raises(
        BaseModelError, match=r"no weights of the variant fp32: leave --variant out or give --variant fp16\.$"
    ):
        load(base, variant="fp32")


@pytest.mark.parametrize("change", [{"beta_schedule": "nope"}, {"beta_start": -1.0}])
def test_schedulers_that_cannot_be_made(change: dict[str, Any], base: Path) -> None:
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(base)
