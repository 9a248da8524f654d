"""The divergence from the base on the page that a run ends with, and where its prompts are said to come from."""

from pathlib import Path

import pytest
import torch

from rlr_peft.build import derive_seed
from rlr_peft.compare import images_of_each, prompts_and_seeds
from rlr_peft.estimators import reference_mean, step_kl
from rlr_peft.training import divergence_from_base, evaluation_source
from tests.training.runs import build, config_file


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_is_the_kl_of_the_steps_of_sampled_paths(workplace: Path, tmp_path: Path, dropout: float) -> None:
    values = {"evaluation_prompt_path": str(workplace / "unseen.txt"), "num_evaluation_images": 12}
    run = build(config_file(workplace, tmp_path / "out", lora_dropout=dropout, **values))
    fresh = divergence_from_base(run)
    assert fresh is not None and float(fresh.max()) < 1e-9, "a fresh adapter changes nothing"
    with torch.no_grad():
        for parameter in run.chain.parameters:
            parameter.fill_(0.02)
    found = divergence_from_base(run)
    prompts, seeds = prompts_and_seeds(["a cat", "a dog"], 3, derive_seed(run.config.training.seed, "divergence"))
    run.chain.denoiser.eval()
    expected = torch.zeros(3)
    with torch.no_grad():
        trajectory = run.chain.sample(prompts, seeds)
        for t in range(1, run.chain.num_steps + 1):
            if run.chain.std(t) > 0:
                mean = run.chain.replay(trajectory, t).mean
                expected += step_kl(mean, reference_mean(run.chain, trajectory, t), run.chain.std(t))
    assert float(expected.min()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_it_is_that_of_the_whole_window_wherever_the_last_update_had_its_noise(workplace: Path, tmp_path: Path) -> None:
    """A run that is resumed after its last update must find the same, and `compare` too."""
    moving = {"estimator": "grpo", "step_kind": "cps", "eta": 0.8, "noise_window": [2, 4], "noise_steps": 1}
    unseen = {"evaluation_prompt_path": str(workplace / "unseen.txt"), "num_evaluation_images": 8}
    run = build(config_file(workplace, tmp_path / "out", **moving, **unseen))
    with torch.no_grad():
        for parameter in run.chain.parameters:
            parameter.fill_(0.02)
    before = divergence_from_base(run)
    run.chain.place_noise(3, 3)
    after = divergence_from_base(run)
    assert before is not None and after is not None and float(before.min()) > 0
    assert torch.equal(after, before)


def test_without_noise_or_prompts_there_is_none(workplace: Path, tmp_path: Path) -> None:
    unseen = {"evaluation_prompt_path": str(workplace / "unseen.txt")}
    still = {"eta": 0.0, "estimator": "full-bp", **unseen}
    assert divergence_from_base(build(config_file(workplace, tmp_path / "still", **still))) is None
    assert divergence_from_base(build(config_file(workplace, tmp_path / "blind"))) is None


def test_where_the_prompts_come_from(workplace: Path, tmp_path: Path) -> None:
    named = build(config_file(workplace, tmp_path / "a", evaluation_prompt_path=str(workplace / "unseen.txt")))
    assert evaluation_source(named) == "in unseen.txt"
    assert evaluation_source(build(config_file(workplace, tmp_path / "b", validation_split_percentage=40))) == (
        "held back of prompts.txt"
    )


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [(["a", "b"], "1 image each"), (["a", "a", "b", "b"], "2 images each"), (["a", "a", "b"], "1 to 2 images each")],
)
def test_how_many_images_a_prompt_has(prompts: list[str], expected: str) -> None:
    assert images_of_each(prompts) == expected
