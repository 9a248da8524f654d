"""The untrained adapter is saved and loaded before training: what cannot be saved shows then, in every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, get_peft_model_state_dict
from torch import nn

from rlr_peft.build import attach_adapters
from rlr_peft.chain import default_lora_targets, family_of, lora_targets
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


@pytest.mark.parametrize("layers", ["attention", "all-linear"])
def test_named_groups_of_layers_are_adapted_and_come_back(layers: str) -> None:
    pipeline = tiny_stable_diffusion()
    targets = lora_targets(layers, family_of(pipeline), pipeline.unet)
    attach_lora(pipeline.unet, target_modules=targets, rank=2)
    adapted = {key.split(".lora_")[0] for key in lora_parameters(pipeline.unet)}
    linear = {
        name.removesuffix(".base_layer")
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    attention = {name for name in linear if ".attn" in name}
    assert 0 < len(attention) < len(linear)
    assert adapted == (attention if layers == "attention" else linear)
    check_adapter_saves(pipeline)


@pytest.mark.parametrize("kind", [LoKrConfig(r=2), LoHaConfig(r=2), OFTConfig(r=0, oft_block_size=2)], ids=type)
def test_diffusers_loads_no_other_kind_back(kind: PeftConfig, tmp_path: Path) -> None:
    """Why these kinds are refused: should this fail with a newer diffusers, they could be trained."""
    pipeline = tiny_stable_diffusion()
    kind.target_modules = ["to_q", "to_v"]
    pipeline.unet.add_adapter(kind)
    tensors = get_peft_model_state_dict(pipeline.unet, adapter_name="default")
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        tiny_stable_diffusion().load_lora_weights(tmp_path)


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
