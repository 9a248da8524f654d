"""The memory plan of families that ship no configs: from a folder, or a clear refusal."""

from collections.abc import Callable

import pytest

from rlr_peft.config import Config, load_config
from rlr_peft.evaluation.memory_plan.plan import PHASES
from rlr_peft.training.planning import PlanError, plan_run
from tests.families.table import CASES


def config_of(name: str, folder: str, *more: str) -> Config:
    options = [word for key, value in CASES[name].options.items() for word in (f"--{key}", str(value))]
    required = ["--prompt_path", "tiny-shapes/train", "--reward_fn", "jpeg-compressibility"]
    base = ["--pretrained_model_name_or_path", folder, "--num_inference_steps", "3"]
    return load_config([*base, *required, *options, *more])


@pytest.mark.parametrize("name", ["sdxl", "flux-true-cfg", "text-to-video-sd", "wan-2.1", "ltx"])
def test_a_familys_folder_is_planned(name: str, folder_of: Callable[[str], str]) -> None:
    plan = plan_run(config_of(name, folder_of(name)))
    assert all(plan.tensors(phase) > 0 for phase in PHASES)
    step = plan.facts.measured.step
    assert step[False].saved > 0 and step.get(True, step[False]).saved <= step[False].saved
    assert plan.facts.lora > 0


@pytest.mark.parametrize("name", ["qwen-image", "wan-2.2", "sana"])
def test_a_pipeline_that_looks_at_values_is_refused_clearly(name: str, folder_of: Callable[[str], str]) -> None:
    with pytest.raises(PlanError, match="Pipeline cannot be planned: it looks at values"):
        plan_run(config_of(name, folder_of(name)))


def test_guidance_by_two_calls_doubles_the_tape(folder_of: Callable[[str], str]) -> None:
    folder = folder_of("wan-2.1")
    alone, guided = (
        plan_run(config_of("wan-2.1", folder, "--guidance_scale", scale)).facts.measured.step[False].saved
        for scale in ("1", "5")
    )
    assert guided == pytest.approx(2 * alone, rel=0.05)
