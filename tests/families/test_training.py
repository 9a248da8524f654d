"""The training script on every family: two steps, an adapter that loads as documented, and a resumed run."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from rlr_peft.lora import load_lora
from tests.families.table import CASES, COLOURS, NUM_STEPS, VIDEOS, load, picture
from tests.training.runs import WEIGHTS, finish, run_script, start, train_here

REWARD = """
def redness(images, prompts):
    red = images[..., 0, :, :] - images[..., 1:, :, :].mean(-3)
    return red.flatten(1).mean(1)
"""
NAMES = [name for name in CASES if name not in ("sd-v", "flux-true-cfg")]
WITHOUT_LOADER = ("pixart-sigma", "text-to-video-sd")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    (folder / "prompts.txt").write_text("red ball\nblue box\n")
    rows = []
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(picture(colour).data or b"")
        rows.append({"text": f"make it {name}", "from": f"{name}.png"})
    (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def config_of(name: str, base: str, place: Path, output_dir: Path, **values: object) -> Path:
    config = {
        "pretrained_model_name_or_path": base,
        "prompt_path": str(place / "prompts.txt"),
        "reward_fn": f"{place / 'rewards.py'}:redness",
        "num_inference_steps": NUM_STEPS,
        "estimator": "rlr",
        "fo_steps": 1,
        "train_batch_size": 2,
        "num_images_per_prompt": 2,
        "learning_rate": 0.01,
        "report_to": "none",
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "skip_final_inference": True,
        "output_dir": str(output_dir),
        **CASES[name].options,
        **values,
    }
    if CASES[name].needs_image:
        config |= {"prompt_path": str(place / "pictures.jsonl"), "image_column": "from"}
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def draw(pipeline: DiffusionPipeline, name: str) -> torch.Tensor:
    options = dict(CASES[name].options)
    if name in ("sana", "pixart-sigma"):
        options["use_resolution_binning"] = False
    if CASES[name].needs_image:
        options["image"] = picture(COLOURS["red"]).fitted(options["width"], options["height"])
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt="red ball", num_inference_steps=2, generator=generator, output_type="pt", **options)[0]


def load_as_documented(pipeline: DiffusionPipeline, name: str, folder: Path) -> None:
    if name in WITHOUT_LOADER:
        load_lora(pipeline, folder)
    else:
        pipeline.load_lora_weights(str(folder))
    if name == "wan-2.2":
        pipeline.load_lora_weights(str(folder / "transformer_2"), load_into_transformer_2=True)


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_an_adapter_and_a_resumed_run(
    name: str, folder_of: Callable[[str], str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder_of(name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shown = CASES[name].needs_image  # whose validation prompts have no pictures
    final = {} if shown else {"validation_prompt": ["sky"], "num_validation_images": 1, "skip_final_inference": False}
    averaged = {"use_ema": name == "wan-2.2"}  # of both experts
    config = config_of(name, base, place, whole, **final, **averaged)
    run_script(monkeypatch, config)  # ends with an error if the reloaded adapter drew other images

    plain, adapted, from_checkpoint = load(base), load(base), load(base)
    load_as_documented(adapted, name, whole)
    load_as_documented(from_checkpoint, name, whole / "checkpoint-2")
    images = draw(adapted, name)
    assert torch.equal(images, draw(from_checkpoint, name))
    assert (images - draw(plain, name)).abs().max() > 1e-4, "the adapter must do something"
    for weights in whole.rglob(WEIGHTS):
        assert any(tensor.abs().max() > 0 for key, tensor in load_file(weights).items() if "lora_B" in key)

    parts.mkdir()  # what a run leaves that is killed in its second step
    shutil.copytree(whole / "checkpoint-1", parts / "checkpoint-1")
    shutil.copy(whole / "metrics.jsonl", parts)
    train_here(config_of(name, base, place, parts, **averaged), "--resume_from_checkpoint", "latest")
    experts = [WEIGHTS, f"transformer_2/{WEIGHTS}"] if name == "wan-2.2" else [WEIGHTS]
    for file in experts:
        assert (parts / "checkpoint-2" / file).read_bytes() == (whole / "checkpoint-2" / file).read_bytes()
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()

    if not shown:
        assert (whole / "validation" / "step-000002.png").stat().st_size > 0
    if name in VIDEOS and not shown:
        with Image.open(whole / "validation" / "step-000002" / "000.gif") as video:
            # 8 frames a second in GIF's hundredths, or LTX's own 24 or 25
            assert video.n_frames > 1 and video.info["duration"] == (40 if name in ("ltx", "ltx-2") else 120)
    card = (whole / "README.md").read_text()
    tag = f"pipeline_tag: {'image' if shown else 'text'}-to-{'video' if name in VIDEOS else 'image'}"
    assert tag in card
    assert ("load_into_transformer_2=True" in card) == (name == "wan-2.2")
    assert ("set_peft_model_state_dict" in card) == (name in WITHOUT_LOADER)


def test_a_process_of_its_own(folder_of: Callable[[str], str], place: Path, tmp_path: Path) -> None:
    output = finish(start(config_of("sd3", folder_of("sd3"), place, tmp_path / "out")))
    assert "draws the same images bit for bit" in output
    assert f"pipe.load_lora_weights({str(tmp_path / 'out')!r})" in output
    assert "Traceback" not in output and "not expected by" not in output


@pytest.mark.parametrize("name", ["pixart-sigma", "text-to-video-sd", "wan-2.2"])
def test_the_cards_snippet_draws_what_the_adapter_draws(
    name: str, folder_of: Callable[[str], str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_script(monkeypatch, config_of(name, folder_of(name), place, tmp_path / "out", max_train_steps=1))
    card = (tmp_path / "out" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    seen: dict[str, object] = {}
    exec(compile(snippet, "snippet", "exec"), seen)
    file = Path("video.gif" if name in VIDEOS else "image.png")
    assert file.stat().st_size > 0
    loaded = load(folder_of(name))
    load_as_documented(loaded, name, tmp_path / "out")
    # The snippet's scheduler is that of the run's steps; here base and adapter are compared.
    shown: Any = seen["pipe"]
    shown.scheduler = loaded.scheduler
    assert torch.equal(draw(loaded, name), draw(shown, name))


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_one_expert_alone(
    expert: str, folder_of: Callable[[str], str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = config_of("wan-2.2", folder_of("wan-2.2"), place, out, denoiser=expert, max_train_steps=1)
    run_script(monkeypatch, config)
    saved = [path.relative_to(out).as_posix() for path in out.rglob(WEIGHTS) if "checkpoint" not in str(path)]
    assert saved == [WEIGHTS if expert == "transformer" else f"transformer_2/{WEIGHTS}"]


def test_what_cannot_be_done_is_said(
    folder_of: Callable[[str], str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        ("text-to-video-sd", "gradient_checkpointing"): "UNet3DConditionModel cannot recompute its activations",
        ("wan-2.1", "vae_gradient_checkpointing"): "AutoencoderKLWan cannot recompute its activations",
    }
    for (name, flag), message in cases.items():
        config = config_of(name, folder_of(name), place, tmp_path / "out", **{flag: True})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
            run_script(patch, config)
        assert caught.value.code == 2
        assert f"error: The run cannot be built: {flag}: diffusers' {message}" in capsys.readouterr().err
