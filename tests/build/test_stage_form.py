"""Whether stage prompts are told as parts or as a contrast, and that training and inference decide alike."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from rlr_peft.build import choose_stage_form
from rlr_peft.chain import DenoisingChain
from rlr_peft.config import ChainArguments, StageFormName
from rlr_peft.inference import DiffusiveChainOfThought
from rlr_peft.prompt import Prompt, make_stages
from rlr_peft.prompts import decompose_by_rules, without_stage
from rlr_peft.tiny_shapes import pipeline_path, scenes_of
from tests.families.image_pipelines import flux
from tests.pipelines import tiny_stable_diffusion
from tests.training.runs import WEIGHTS, run_script, train_here

GUIDED = ChainArguments(num_inference_steps=3, guidance_scale=3.0)


def by_rules(text: str, negative: str | None = None) -> Prompt:
    return Prompt(text, negative, decompose_by_rules(text))


# The tiny text encoder holds 16 tokens, a letter each, start and end included.
FITS, CUT = by_rules("a cat, on sea, fur"), by_rules("a cat, on a beach, fur")
WRITTEN = replace(FITS, stages=("sea", "a cat", "fur"))


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return tiny_stable_diffusion()


def told(form: StageFormName, pipeline: object, prompt: Prompt, **knobs: object) -> list[tuple[str, str | None]]:
    chosen = choose_stage_form(form, pipeline, replace(GUIDED, **knobs))  # type: ignore[arg-type]
    return [(one.text, one.negative_prompt) for one in (chosen(prompt, index) for index in range(3))]


def parts(prompt: Prompt) -> list[tuple[str, str | None]]:
    return [(text, prompt.negative_prompt) for text in prompt.stages]


def test_every_prompt_decides_for_itself(pipeline: StableDiffusionPipeline) -> None:
    contrast = [(FITS.text, "a cat, fur"), (FITS.text, None), (FITS.text, "a cat, on sea")]
    assert told("auto", pipeline, FITS) == told("contrast", pipeline, FITS) == contrast
    assert told("auto", pipeline, CUT) == parts(CUT) and told("contrast", pipeline, CUT)[0] == (CUT.text, "a cat, fur")
    assert told("auto", pipeline, WRITTEN) == parts(WRITTEN) and told("parts", pipeline, FITS) == parts(FITS)
    form = choose_stage_form("auto", pipeline, GUIDED)
    assert form.describe([FITS, FITS, Prompt("plain")]) == "as a contrast"
    assert form.describe([WRITTEN]) == "as parts (1 with stage prompts that were edited)"
    some = "as a contrast (1 of 2 prompts, else as parts: 1 longer than the text encoder holds)"
    assert form.describe([FITS, CUT]) == some


def test_what_columns_or_a_model_told_is_a_part_though_the_rules_would_say_the_same(
    pipeline: StableDiffusionPipeline,
) -> None:
    form = choose_stage_form("auto", pipeline, GUIDED, by_rules=False)
    assert form(FITS, 0) == Prompt(FITS.stages[0])
    assert form.describe([FITS]) == "as parts (the rules did not split the prompts)"


def test_a_negative_prompt_comes_before_the_contrast(pipeline: StableDiffusionPipeline) -> None:
    own = [(FITS.text, "ugly, a cat, fur"), (FITS.text, "ugly"), (FITS.text, "ugly, a cat, on sea")]
    assert told("auto", pipeline, by_rules(FITS.text, "ugly")) == own
    knobs = replace(GUIDED, negative_prompt="ugly")
    form = choose_stage_form("auto", pipeline, knobs)
    chain = DenoisingChain(pipeline, knobs, stages=make_stages(), stage_form=form)
    for prompt, expected in ((FITS, own), (by_rules(FITS.text, ""), told("auto", pipeline, by_rules(FITS.text, "")))):
        conditions = [one for _, (one,) in chain._conditioned([prompt], range(3, 0, -1))]
        assert [(one.text, one.negative_prompt) for one in conditions] == expected


def test_without_guidance_away_from_a_text_there_are_parts() -> None:
    """FLUX has its guidance built in, which leads away from nothing, unless ``true_cfg_scale`` asks for it."""
    base = flux()
    sizes = {"height": 16, "width": 16, "max_sequence_length": 16}
    assert told("auto", base, FITS, **sizes) == parts(FITS)
    assert told("auto", base, FITS, true_cfg_scale=2.0, **sizes)[0] == (FITS.text, "a cat, fur")
    unguided = tiny_stable_diffusion(), replace(GUIDED, guidance_scale=1.0)
    assert told("auto", unguided[0], FITS, guidance_scale=1.0) == parts(FITS)
    assert choose_stage_form("auto", *unguided).describe([FITS]) == "as parts (guidance leads away from no text)"
    consistency_model = tiny_stable_diffusion()
    consistency_model.unet.register_to_config(time_cond_proj_dim=32)
    assert told("auto", consistency_model, FITS) == parts(FITS)
    with pytest.raises(ValueError, match="dcot_form: expected guidance that leads away from a text with contrast, whi"):
        told("contrast", base, FITS, **sizes)


def contrasts_in_words(caption: str) -> list[str]:
    stages = decompose_by_rules(caption)
    return [f"{name}: {without_stage(caption, stages, index)}" for index, name in enumerate(("coarse", "mid", "fine"))]


def test_tiny_shapes_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A caption that fits is trained and drawn as a contrast, one that is cut as parts; a named form goes on alike."""
    captions = [scene.caption() for scene in scenes_of("test")[:2]]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    values = {
        **{"pretrained_model_name_or_path": "tiny-shapes", "prompt_path": str(tmp_path / "captions.txt")},
        **{"reward_fn": "tiny-shapes", "dcot_rules": True, "num_inference_steps": 3, "guidance_scale": 4.0},
        **{"estimator": "truncated-bp", "fo_steps": 1, "train_batch_size": 2, "num_images_per_prompt": 1},
        **{"learning_rate": 0.01, "max_train_steps": 2, "checkpointing_steps": 1, "report_to": "none"},
        **{"skip_final_inference": True, "output_dir": str(tmp_path / "auto")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with caplog.at_level(logging.INFO):
        run_script(monkeypatch, tmp_path / "run.yaml")
    assert "  Chain-of-Thought as a contrast = coarse (steps 3-3), mid (2-2), fine (1-1)" in caplog.messages
    away = contrasts_in_words(captions[0])
    assert f"    {captions[0]} -> the whole prompt; negative prompts: {'; '.join(away)}" in caplog.messages
    card = (tmp_path / "auto" / "README.md").read_text()
    assert f"| coarse | 33% | {captions[0]} | {away[0].removeprefix('coarse: ')} |" in card
    whole = "on the whole prompt, with the prompt without the part of its stage as negative prompt"
    assert f"{whole}: coarse (steps 3-3)" in card
    (tmp_path / "named").mkdir()
    shutil.copytree(tmp_path / "auto" / "checkpoint-1", tmp_path / "named" / "checkpoint-1")
    flags = ["--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path / "named")]
    train_here(tmp_path / "run.yaml", *flags, "--dcot_form", "contrast")
    first, second = (tmp_path / name / "checkpoint-2" / WEIGHTS for name in ("auto", "named"))
    assert first.read_bytes() == second.read_bytes()

    base = StableDiffusionPipeline.from_pretrained(pipeline_path(), dtype=torch.float32, safety_checker=None)
    base.load_lora_weights(tmp_path / "auto")
    long = ", and ".join([captions[1], *["a shape"] * 8])  # 32 tokens are held
    images = {}
    for form in ("auto", "contrast", "parts"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"dcot_form": form}))
        draw = DiffusiveChainOfThought.from_config(base, tmp_path / "config.yaml", eta=0.0)
        images[form] = draw([captions[0], long], output_type="pt").images
    same = [[torch.allclose(images["auto"][i], images[form][i], atol=1e-5) for form in images] for i in range(2)]
    assert same == [[True, True, False], [True, False, True]]
