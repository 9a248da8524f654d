"""The untrained adapter is saved and loaded before training: what cannot be saved shows then, in every family."""

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline

from rlr_peft.build.chain import attach_adapters
from rlr_peft.chain.families import default_lora_targets, family_of
from rlr_peft.config import ConfigError, load_config
from rlr_peft.lora import AdapterMismatchError, adapted_denoisers, attach_lora, check_adapter_saves, lora_parameters
from tests.families.conftest import folder_of, quiet  # noqa: F401
from tests.families.table import CASES, load
from tests.pipelines import tiny_stable_diffusion


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("sd-v", "flux-true-cfg")])
def test_every_family_saves_what_it_would_train(name: str, folder_of: Callable[[str], str]) -> None:  # noqa: F811
    pipeline = load(folder_of(name))
    family = family_of(pipeline)
    for part in family.denoisers:
        denoiser = getattr(pipeline, part)
        attach_lora(denoiser, target_modules=default_lora_targets(family, denoiser), rank=2)
    before = {key: value.detach().clone() for part in family.denoisers for key, value in named(pipeline, part).items()}
    state, components = torch.get_rng_state(), dict(pipeline.components)
    check_adapter_saves(pipeline)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(pipeline.components) == components and adapted_denoisers(pipeline) == list(family.denoisers)
    after = {key: value for part in family.denoisers for key, value in named(pipeline, part).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(value.requires_grad for value in after.values())


def named(pipeline: object, part: str) -> dict[str, torch.nn.Parameter]:
    return {f"{part}.{key}": value for key, value in lora_parameters(getattr(pipeline, part)).items()}


def test_what_does_not_come_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_stable_diffusion()
    attach_lora(pipeline.unet, target_modules=["to_q", "conv1"], rank=2)
    # A loader that loads nothing, without an error.
    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", lambda *_, **__: None)
    with pytest.raises(AdapterMismatchError, match="loaded nothing"):
        check_adapter_saves(pipeline)


@pytest.mark.parametrize("denoiser", ["vae", "text_encoder"])
def test_parts_that_take_no_steps_are_no_denoisers(denoiser: str) -> None:
    required = ["--pretrained_model_name_or_path", "x", "--prompt_path", "simple-animals", "--reward_fn", "aesthetic"]
    pipeline = tiny_stable_diffusion()
    with pytest.raises(ConfigError, match=f"--denoiser: expected unet, transformer.*got {denoiser} of StableDiff"):
        attach_adapters(load_config(required), pipeline, family_of(pipeline, [denoiser]))
