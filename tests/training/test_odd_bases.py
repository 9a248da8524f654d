"""Bases that train into nothing: odd schedulers are refused by every command, images that are no numbers are said."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import train_rlr_lora
from rlr_peft.build import ImagesError, build_chain, render
from rlr_peft.cli import main
from rlr_peft.inference import DiffusiveChainOfThought
from rlr_peft.lora import WEIGHT_NAME, attach_lora, save_lora
from rlr_peft.prompt import as_prompts
from rlr_peft.training import Progress, evaluate_base, finish, save_validation_images
from tests.pipelines import tiny_stable_diffusion
from tests.training.runs import build, config_file

SCHEDULERS = {
    "sample": ({"prediction_type": "sample"}, "says prediction_type='sample', and the chain's steps know epsilon"),
    "zero SNR, epsilon": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "starts at pure noise (rescale_betas_zero_snr), where epsilon prediction leaves the image undetermined",
    ),
    "betas": ({"trained_betas": [0.1, 0.2]}, "has 2 trained_betas for num_train_timesteps=1000"),
    "thresholding": ({"thresholding": True}, "Expected a scheduler with clip_sample=False and thresholding=False"),
}


def train(words: Sequence[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_rlr_lora.py", *words])
        return train_rlr_lora.main()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_command_refuses_an_odd_scheduler_in_one_sentence(
    name: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected = SCHEDULERS[name]
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(tmp_path / "base")
    attach_lora(pipeline.unet, target_modules=["to_q"], rank=2)
    save_lora(pipeline, tmp_path / "adapter")
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    config = config_file(workplace, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "base"))
    values = yaml.safe_load(config.read_text())
    compared = [f"--base={tmp_path / 'base'}", f"--prompts={values['prompt_path']}", f"--reward={values['reward_fn']}"]
    commands: dict[str, Callable[[], int]] = {
        "train": lambda: train(["--config", str(config)]),
        "diagnose": lambda: main(["diagnose", "--config", str(config), "--output", str(tmp_path / "r.html")]),
        "plan": lambda: main(["plan", "--config", str(config)]),
        "compare": lambda: main(
            ["compare", *compared, f"--adapter={tmp_path / 'adapter'}", f"--output={tmp_path / 'compared'}"]
        ),
    }
    shown = commands if name in ("sample", "zero SNR, epsilon") else {"train": commands["train"]}
    for command, run in shown.items():
        with pytest.raises(SystemExit) as stop:
            run()
        errors = capsys.readouterr().err
        assert stop.value.code == 2 and expected in errors.split("error: ")[1], command
        assert errors.split("error: ")[1].count("\n") == 1 and "Traceback" not in errors, command
    with pytest.raises(ValueError, match=expected.split("(")[0].replace(".", r"\.")):
        DiffusiveChainOfThought(DiffusionPipeline.from_pretrained(tmp_path / "base"), num_inference_steps=4)


def test_a_denoiser_that_cannot_be_saved_is_refused_before_training(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(workplace, tmp_path / "out")
    with pytest.raises(SystemExit):
        train(["--config", str(config), "--denoiser", "vae", "--lora_layers", "to_q"])
    assert "--denoiser: expected unet, transformer, transformer_2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def base_with(folder: Path, part: str, name: str, value: float) -> Path:
    """A base with one number that spoils what its part puts out."""
    tiny_stable_diffusion().save_pretrained(folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_images_that_are_not_finite_name_the_step_and_lose_nothing(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_with(tmp_path / "base", "vae", "decoder.conv_out.bias", torch.nan)
    options = {"evaluation_prompt_path": str(workplace / "unseen.txt"), "validation_prompt": ["sky"]}
    run = build(config_file(workplace, tmp_path / "out", pretrained_model_name_or_path=str(base), **options))
    decoder = r"in 2 of 2, the first of \".*\": the latents are finite and the decoded images are not; .*fp16"
    with pytest.raises(ImagesError, match=decoder):
        evaluate_base(run)
    assert save_validation_images(run, 3, "validation") is None  # training goes on
    assert "No validation images after 3 updates: Expected finite images" in caplog.text
    with pytest.raises(ImagesError, match=r"The trained adapter is saved in .*out, without numbers and card"):
        finish(run, Progress(), None)
    assert (run.output_dir / WEIGHT_NAME).exists() and not (run.output_dir / "README.md").exists()

    chain = build_chain(run.config, run.pipeline).at(eta=0.0)
    calls = iter(range(100))

    def spoil(module: object, args: object, output: object) -> None:
        if next(calls) == 2:
            output[0].fill_(torch.inf)  # type: ignore[index]

    with run.pipeline.unet.register_forward_hook(spoil), pytest.raises(ImagesError, match="from step 3 of 4 on; use"):
        render(chain, ["sky"], [0])


def test_compare_does_not_keep_images_that_are_not_finite(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_with(tmp_path / "base", "unet", "conv_out.bias", torch.nan)
    pipeline = tiny_stable_diffusion()
    attach_lora(pipeline.unet, target_modules=["to_q"], rank=2)
    save_lora(pipeline, tmp_path / "adapter")
    words = {"base": base, "adapter": tmp_path / "adapter", "prompts": workplace / "unseen.txt"}
    words |= {"reward": f"{workplace / 'rewards.py'}:redness", "output": tmp_path / "compared"}
    with pytest.raises(SystemExit):
        main(["compare", *(f"--{flag}={value}" for flag, value in words.items()), "--num_inference_steps", "4"])
    assert "the denoiser's latents are not finite from step 1 of 4 on" in capsys.readouterr().err
    assert not list((tmp_path / "compared").rglob("*.png"))


def test_images_of_one_colour_are_said(workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = base_with(tmp_path / "base", "vae", "decoder.conv_out.bias", -100.0)
    run = build(config_file(workplace, tmp_path / "out", pretrained_model_name_or_path=str(base)))
    render(run.chain, as_prompts(["sky", "sea"]), [0, 1])
    assert "2 of 2 images have one colour throughout, the first is of 'sky'" in caplog.text
    shutil.rmtree(base)
