"""The shipped pipeline is a plain StableDiffusionPipeline that draws what is asked."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from benchmarks.tiny_shapes.dataset import fresh_drawings, labels_of
from benchmarks.tiny_shapes.text import token_ids
from rlr_peft.rewards import load_judge
from rlr_peft.tiny_shapes import ATTRIBUTES, Scene, caption_words, judges_path, parse_caption, pipeline_path, prompts


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """The pipeline as any user loads it."""
    loaded = StableDiffusionPipeline.from_pretrained(pipeline_path(), dtype=torch.float32, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_plain_loading_draws_in_single_precision_and_half_precision_is_an_option() -> None:
    plain = StableDiffusionPipeline.from_pretrained(pipeline_path())
    plain.set_progress_bar_config(disable=True)
    assert {plain.text_encoder.dtype, plain.unet.dtype, plain.vae.dtype} == {torch.float32}
    image = plain("a red star", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    half = StableDiffusionPipeline.from_pretrained(pipeline_path(), dtype=torch.float16)
    assert {half.text_encoder.dtype, half.unet.dtype, half.vae.dtype} == {torch.float16}


def test_package_import_needs_no_torch() -> None:
    code = "import sys, rlr_peft.tiny_shapes as t; assert 'torch' not in sys.modules; assert t.pipeline_path().is_dir()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_configuration_is_the_documented_one(pipeline: StableDiffusionPipeline) -> None:
    scheduler = pipeline.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config["prediction_type"] == "v_prediction"
    assert scheduler.config["rescale_betas_zero_snr"] is True
    assert scheduler.config["timestep_spacing"] == "trailing"
    assert pipeline.safety_checker is None
    assert pipeline.unet.config["sample_size"] * pipeline.vae_scale_factor == 64
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id


def test_latents_have_unit_variance(pipeline: StableDiffusionPipeline) -> None:
    images, _ = fresh_drawings(64, seed=5)
    with torch.no_grad():
        latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config["scaling_factor"]
    assert latents.shape == (64, 4, 16, 16)
    assert (latents.mean((0, 2, 3)).abs() < 0.2).all()
    assert ((latents.std((0, 2, 3)) - 1).abs() < 0.2).all()


def test_every_caption_word_is_one_token(pipeline: StableDiffusionPipeline) -> None:
    for word in caption_words():
        assert len(pipeline.tokenizer(word).input_ids) == 3, word
    captions = prompts("test")[:50]
    expected = pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(token_ids(captions), expected)


def test_tokenizer_folder_serves_old_and_new_transformers() -> None:
    folder = pipeline_path() / "tokenizer"
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {file.name for file in folder.iterdir()}


def test_text_weights_have_the_names_that_old_and_new_transformers_read() -> None:
    names = load_file(pipeline_path() / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_weights_are_half_precision_safetensors_within_the_budget() -> None:
    files = [file for folder in (pipeline_path(), judges_path()) for file in folder.rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 5
    assert sum(file.stat().st_size for file in files) <= 15e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".ckpt", ".unfinished")]
    assert {value.dtype for file in weights for value in load_file(file).values()} == {torch.float16}
    for file in files:
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            assert not isinstance(content, dict) or "_name_or_path" not in content


def test_images_show_what_the_prompts_ask(pipeline: StableDiffusionPipeline) -> None:
    captions = prompts("test")[:32]
    asked = torch.tensor([labels_of(Scene(**parse_caption(caption))) for caption in captions])
    generator = torch.Generator().manual_seed(0)
    output = pipeline(captions, num_inference_steps=10, guidance_scale=4.0, generator=generator, output_type="np")
    images = torch.from_numpy(np.stack(output.images)).permute(0, 3, 1, 2)
    assert images.shape == (32, 3, 64, 64)
    with torch.no_grad():
        read = load_judge("reward")(images)
    hits = {
        attribute: (read[attribute].argmax(1) == asked[:, column]).double().mean().item()
        for column, attribute in enumerate(ATTRIBUTES)
    }
    # Chance is 1/6, 1/7 and 1/8.
    assert hits["background"] > 0.8, hits
    assert hits["color"] > 0.5, hits
    assert hits["shape"] > 0.4, hits
