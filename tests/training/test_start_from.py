"""A run that starts from a saved adapter draws what that adapter draws, and measures from the base or from it."""

from pathlib import Path

import pytest
import torch

from rlr_peft.lora import AdapterMismatchError, attach_lora, find_adapter, load_fitting_lora, start_from
from tests.pipelines import tiny_stable_diffusion
from tests.test_lora_fitting import ATTENTION, adapter_of, render
from tests.training.runs import build, config_file, train_here


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 2, scaled by three halves."""
    return adapter_of(tiny_stable_diffusion(), tmp_path_factory.mktemp("saved"), rank=2, lora_alpha=3)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_the_start_draws_what_the_saved_adapter_draws(saved: Path, init: str) -> None:
    """Also into a larger rank with another scale, and more layers."""
    loaded, started = tiny_stable_diffusion(), tiny_stable_diffusion()
    base = render(loaded)
    load_fitting_lora(loaded, find_adapter(str(saved)))
    options = {"rank": 4, "lora_alpha": 2, "use_rslora": True, "init_lora_weights": init}
    attach_lora(started.unet, target_modules=[*ATTENTION, "proj_in"], **options)
    start_from(started, find_adapter(str(saved)))
    expected = render(loaded)
    assert (expected - base).abs().max() > 5e-3
    torch.testing.assert_close(render(started), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1}, "init_adapter: expected a rank of 1 or less, got 2 at unet.*; give --rank 2."),
        ({"target_modules": ["to_q"]}, "init_adapter: expected layers that are trained here, got .* such as unet"),
        ({"use_dora": True}, "init_adapter: expected plain LoRA here and there, got DoRA or biases at unet"),
    ],
)
def test_what_cannot_hold_the_saved_adapter_is_refused(saved: Path, options: dict, message: str) -> None:
    pipeline = tiny_stable_diffusion()
    attach_lora(pipeline.unet, **{"target_modules": ATTENTION, "rank": 2, **options})
    with pytest.raises(AdapterMismatchError, match=message):
        start_from(pipeline, find_adapter(str(saved)))


def test_a_run_starts_from_an_adapter_and_may_measure_from_it(workplace: Path, tmp_path: Path) -> None:
    values = {"estimator": "grpo", "kl_interval": 1, "kl_steps": "all", "max_train_steps": 2, "rank": 2}
    train_here(config_file(workplace, tmp_path / "first", **values))
    first = tmp_path / "first" / "checkpoint-2"
    begun = {}
    for reference in ("base", "init_adapter"):
        config = config_file(workplace, tmp_path / reference, **values, init_adapter=str(first), reference=reference)
        begun[reference] = run = build(config)
        trajectory = run.chain.sample(["red ball"] * 2, [0, 1])
        distance = (run.chain.reference_mean(trajectory, 2) - run.chain.replay(trajectory, 2).mean).abs().max()
        assert (distance < 1e-6) == (reference == "init_adapter")
    weights = torch.load(first / "lora.pt", weights_only=True).values()
    for start, weight in zip(begun["base"].chain.parameters, weights, strict=True):
        assert torch.equal(start, weight)
