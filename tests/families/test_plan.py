"""The memory plan of families that ship no configs: from a folder, or a clear refusal."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from rlr_peft.build import attach_adapters, build_chain
from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain import ReplayedStep, family_of
from rlr_peft.config import Config, load_config
from rlr_peft.plan import PHASES, ArchitectureError, PlanError, build_pipeline, find_architecture, plan_run
from tests.families.table import CASES


def config_of(name: str, folder: str, *more: str) -> Config:
    options = [word for key, value in CASES[name].options.items() for word in (f"--{key}", str(value))]
    required = ["--prompt_path", "tiny-shapes/train", "--reward_fn", "benchmarks.rewards:Centered"]  # with a gradient
    base = ["--pretrained_model_name_or_path", folder, "--num_inference_steps", "3"]
    return load_config([*base, *required, *options, *more])


@pytest.mark.parametrize("name", ["sdxl", "flux-true-cfg", "text-to-video-sd", "wan-i2v", "ltx-i2v", "ltx-2"])
def test_a_familys_folder_is_planned(name: str, folder_of: Callable[[str], str]) -> None:
    plan = plan_run(config_of(name, folder_of(name)))
    assert all(plan.tensors(phase) > 0 for phase in PHASES)
    step = plan.facts.measured.step
    assert step[False].saved > 0 and step.get(True, step[False]).saved <= step[False].saved
    assert plan.facts.lora > 0


LOOKING = {"qwen-image": [], "sana": [], "z-image": ["--max_sequence_length", "128"], "wan-2.2": []}


@pytest.mark.parametrize("name", LOOKING)
def test_a_pipeline_that_looks_at_values_is_planned_as_it_runs(name: str, folder_of: Callable[[str], str]) -> None:
    """Masks, token ids and timesteps have values in the plan; the same pipeline on the CPU, with prompts as long, has
    as much on its tape."""
    config = config_of(name, folder_of(name), *LOOKING[name])
    measured = plan_run(config).facts.measured
    pipeline = build_pipeline(find_architecture(folder_of(name)), torch.device("cpu"), torch.float32)
    attach_adapters(config, pipeline, family_of(pipeline))
    chain = build_chain(config, pipeline)
    prompts = [f"prompt {index}" for index in range(config.training.train_batch_size)]
    trajectory = chain.sample(prompts, list(range(len(prompts))))
    with counted_tape() as tape:
        step = ReplayedStep(chain, trajectory, chain.num_steps)
        assert measured.step[False].saved == pytest.approx(tape.live, rel=0.03)
    del step
    latents = trajectory.latents[0, :1].clone().requires_grad_()
    with counted_tape() as tape:
        images = chain.decode(latents, prompts[:1])
        assert measured.decode[1, False].saved == pytest.approx(tape.live, rel=0.05)
    assert images.numel() * 4 == measured.images
    kept = (trajectory.latents, trajectory.noises, trajectory.pred_original_samples)
    assert measured.trajectory == sum(tensor.nbytes for tensor in kept)


def test_a_pipeline_that_looks_at_what_weights_make_is_refused_clearly(
    folder_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StableDiffusionXLPipeline.encode_prompt

    @wraps(original)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        embeddings = original(self, *args, **kwargs)
        assert embeddings[0].abs().max().item() > 0
        return embeddings

    monkeypatch.setattr(StableDiffusionXLPipeline, "encode_prompt", encode_prompt)
    with pytest.raises(PlanError, match=r"StableDiffusionXLPipeline cannot be planned: .*\(Tensor.item\(\) cannot"):
        plan_run(config_of("sdxl", folder_of("sdxl")))


def test_an_encoder_that_reads_pictures_is_refused_clearly(folder_of: Callable[[str], str]) -> None:
    message = "QwenImageEditPipeline cannot be planned: its text encoder reads pictures through Qwen2VLProcessor"
    with pytest.raises(ArchitectureError, match=message):
        plan_run(config_of("qwen-image-edit", folder_of("qwen-image-edit")))


def test_guidance_by_two_calls_doubles_the_tape(folder_of: Callable[[str], str]) -> None:
    folder = folder_of("wan-2.1")
    alone, guided = (
        plan_run(config_of("wan-2.1", folder, "--guidance_scale", scale)).facts.measured.step[False].saved
        for scale in ("1", "5")
    )
    assert guided == pytest.approx(2 * alone, rel=0.05)
