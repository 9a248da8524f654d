"""A run may be built from objects: a loaded pipeline, a function, a list of prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rlr_peft.build import Run, build_run
from rlr_peft.config import ConfigError, load_config
from rlr_peft.lora import lora_parameters
from rlr_peft.prompt import Prompt, PromptError
from rlr_peft.publishing import load_stored_card
from rlr_peft.training import evaluate_base, finish, resume, train
from tests.training.runs import config_file

PROMPTS = ["red ball", {"text": "blue box", "weight": 2}, "sky"]


def redness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Of the first channel more than of the others."""
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


class Redness(torch.nn.Module):
    """The same as a module."""

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return redness(images, prompts, [])


@pytest.fixture
def config_of(workplace: Path, tmp_path: Path) -> Callable[..., Any]:
    """Configs whose base and reward do not exist, and whose prompts are others."""

    def config(*flags: str, **values: object) -> Any:
        path = config_file(workplace, tmp_path / "run", max_train_steps=2, checkpointing_steps=1, **values)
        nowhere = (
            "--pretrained_model_name_or_path",
            "nowhere",
            "--prompt_path",
            "simple-animals",
            "--reward_fn",
            "no:no",
        )
        return load_config(["--config", str(path), *nowhere, *flags])

    return config


def load(workplace: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(workplace / "base", dtype=torch.float32)


def build(config: Any, pipeline: Any, reward: Any = redness, prompts: Any = PROMPTS) -> Run:
    with torch.random.fork_rng(devices=[]):
        return build_run(config, pipeline, reward, prompts)


def test_a_run_of_objects_trains_proves_its_adapter_and_names_them(
    workplace: Path,
    config_of: Callable[..., Any],
) -> None:
    pipeline = load(workplace)
    config = config_of("--evaluation_prompt_path", str(workplace / "unseen.txt"), "--num_evaluation_images", "2")
    run = build(config, pipeline)
    assert [dict(prompt.metadata) for prompt in run.prompts] == [{}, {"weight": 2}, {}]
    progress = resume(run)
    finish(run, train(run, progress), evaluate_base(run))
    record = load_stored_card(run.output_dir).record
    assert record.base.model == str(workplace / "base")
    assert record.rewards.name == "tests.build.test_objects:redness"
    assert record.config["prompt_path"] == "a list of 3 prompts"
    assert "adapter" in (run.output_dir / "README.md").read_text()
    assert run.pipeline is pipeline


def test_it_resumes_exactly_with_the_same_objects(workplace: Path, config_of: Callable[..., Any]) -> None:
    whole = build(config_of(), load(workplace))
    train(whole)
    resumed = build(config_of("--resume_from_checkpoint", "checkpoint-1"), load(workplace))
    assert train(resumed).step == 2
    expected, got = (lora_parameters(run.chain.denoiser) for run in (whole, resumed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_module_and_a_nameless_base(workplace: Path, config_of: Callable[..., Any]) -> None:
    loaded = load(workplace)
    bare = type(loaded)(**loaded.components, requires_safety_checker=False)
    run = build(config_of(), bare, Redness(), [Prompt("sea", "fog")] * 2)
    assert run.config.model.pretrained_model_name_or_path == "a StableDiffusionPipeline in memory"
    assert run.config.reward.reward_fn == run.reward.name == "tests.build.test_objects:Redness"
    train(run)


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        ("config", {"max_train_steps": 2}, "config: expected a Config of rlr_peft.config, got dict."),
        ("pipeline", "stable-diffusion", "pipeline: expected a loaded diffusers pipeline, got str."),
        ("reward", "aesthetic", "reward: expected a function of images and prompts, or a Reward, got str; a name or "),
        ("prompts", "a cat", "prompts: expected a list of texts or of dictionaries, got str; a file is given as "),
        ("prompts", {"text": "a cat"}, "prompts: expected a list of texts or of dictionaries, got dict; a file"),
        ("prompts", 3, "prompts: expected a list of texts or of dictionaries, got int; a file is given as "),
        ("prompts", ["a", 3], "prompts: expected texts or dictionaries with a text, got int as number 2."),
    ],
)
def test_a_wrong_type_is_one_sentence(config_of: Callable[..., Any], part: str, given: Any, message: str) -> None:
    arguments = {"config": config_of(), "pipeline": None, "reward": None, "prompts": None, part: given}
    with pytest.raises(ConfigError) as refused:
        build_run(**arguments)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_texts_and_dictionaries_are_checked_as_rows_are(config_of: Callable[..., Any]) -> None:
    with pytest.raises(PromptError, match="no column text; its columns are caption"):
        build_run(config_of(), prompts=[{"caption": "a cat"}])
    with pytest.raises(PromptError, match="no text in column text"):
        build_run(config_of(), prompts=[])
    with pytest.raises(PromptError, match=r"expected text in column text, got int"):
        build_run(config_of(), prompts=["a cat", {"text": 3}])


def test_a_loaded_base_leaves_no_choice_of_loading(workplace: Path, config_of: Callable[..., Any]) -> None:
    pipeline = load(workplace)
    with pytest.raises(ConfigError, match="revision: expected a base by its name, got a pipeline that is loaded"):
        build(config_of("--revision", "main"), pipeline)
    build(config_of(), pipeline)
    with pytest.raises(ConfigError, match="expected a base without adapters, got one in its unet; fuse or unload it"):
        build(config_of(), pipeline)
    pipeline.unet.to(torch.float64)
    pipeline.unet.unload_lora()
    with pytest.raises(ConfigError, match=r"expected weights in fp32, fp16 or bf16, got torch.float64"):
        build(config_of(), pipeline)
