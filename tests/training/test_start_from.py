"""A run that starts from a saved adapter draws what that adapter draws, and measures from the base or from it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlr_peft.config import METHODS
from rlr_peft.estimators import reference_mean
from rlr_peft.lora import AdapterMismatchError, attach_lora, find_adapter, load_fitting_lora, merge_lora, start_from
from rlr_peft.training import read_metrics
from tests import test_adapter_formats as formats
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


EVERY_LAYER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "proj_in", "proj_out"]
CANNOT_BE_HELD = {
    "kohya, DoRA": "expected plain LoRA here and there, got DoRA or biases",
    "old text encoder": "expected layers that are trained here, got .* such as text_encoder",
}


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_every_format_that_is_read_is_a_start(kind: str, tmp_path: Path) -> None:
    """What it does to the denoiser; a text encoder's part is refused, as it is not trained."""
    formats.draws.manual_seed(3)
    pipeline = tiny_stable_diffusion()
    before = formats.weights(pipeline)
    tensors, changes = formats.FORMATS[kind](pipeline)
    tensors = formats.with_processors(tensors) if "processor." in kind else tensors
    if kind != "old text encoder":
        tensors = {key: value for key, value in tensors.items() if not key.startswith(("lora_te", "text_encoder"))}
        changes = {name: change for name, change in changes.items() if name.startswith("unet")}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "mine.safetensors")
    attach_lora(pipeline.unet, target_modules=EVERY_LAYER, rank=64)
    if kind in CANNOT_BE_HELD:
        with pytest.raises(AdapterMismatchError, match=CANNOT_BE_HELD[kind]):
            start_from(pipeline, find_adapter(str(tmp_path)))
        return
    start_from(pipeline, find_adapter(str(tmp_path)))
    merge_lora(pipeline)
    formats.assert_changed(pipeline, before, changes)


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
        distance = (reference_mean(run.chain, trajectory, 2) - run.chain.replay(trajectory, 2).mean).abs().max()
        assert (distance < 1e-6) == (reference == "init_adapter")
    weights = torch.load(first / "lora.pt", weights_only=True).values()
    for start, weight in zip(begun["base"].chain.parameters, weights, strict=True):
        assert torch.equal(start, weight)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_the_adapter(saved: Path, workplace: Path, tmp_path: Path, method: str) -> None:
    run = build(
        config_file(
            workplace, tmp_path / "out", estimator=method, num_inference_steps=5, rank=2, init_adapter=str(saved)
        )
    )
    trajectory = run.chain.sample(["red ball"], [0])
    reference = run.chain.replay_reference(trajectory, 2).pred_original_sample
    assert (run.chain.replay(trajectory, 2).pred_original_sample - reference).abs().max() > 1e-3


def test_forward_methods_are_pulled_to_the_base_or_to_the_start(saved: Path, workplace: Path, tmp_path: Path) -> None:
    distances = {}
    for reference in ("base", "init_adapter"):
        values = {"estimator": "ram", "rank": 2, "max_train_steps": 2, "learning_rate": 1e-4}
        values |= {"init_adapter": str(saved), "reference": reference}
        train_here(config_file(workplace, tmp_path / reference, **values))
        lines = read_metrics(tmp_path / reference / "metrics.jsonl")
        distances[reference] = [line["base_distance"] for line in lines]
    assert min(distances["base"]) > 1e-4 > distances["init_adapter"][1] > 1e-12 > distances["init_adapter"][0]
