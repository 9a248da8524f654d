"""Whether an update's samples come from steps with noise, where that is left to the method."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlr_peft.training import calibrate, take_update
from tests.training.runs import build, config_file

NOISELESS: dict[str, dict[str, Any]] = {
    "truncated-bp": {"estimator": "truncated-bp"},
    "refl": {"estimator": "refl"},
    "flowbp-sparse": {"estimator": "flowbp-sparse"},
    "nft": {"estimator": "nft", "num_images_per_prompt": 4, "gradient_accumulation_steps": 4},
}
NOISY: dict[str, dict[str, Any]] = {
    "rlr": {"estimator": "rlr", "fo_steps": 1},
    "rsm": {"estimator": "rsm"},
    "adjoint-matching": {"estimator": "adjoint-matching"},
    "grpo": {"estimator": "grpo"},
    "mirrored noises": {"estimator": "full-bp", "antithetic": True, "num_images_per_prompt": 4},
    "a divergence is measured": {"estimator": "full-bp", "kl_interval": 1},
    "looked at with noise": {"estimator": "full-bp", "evaluation_eta": 1.0},
    "asked for": {"estimator": "full-bp", "step_kind": "ancestral"},
    "asked for in some steps": {"estimator": "full-bp", "noise_window": [2, 3]},
}


@pytest.mark.parametrize("name", NOISELESS)
def test_a_method_that_needs_no_noise_takes_the_updates_of_a_chain_without(
    workplace: Path, tmp_path: Path, name: str
) -> None:
    weights = {}
    for kind in ("auto", "ode", "ancestral"):
        run = build(config_file(workplace, tmp_path / kind, step_kind=kind, **NOISELESS[name]))
        assert run.draws_without_noise == (kind == "auto")
        updates = [take_update(run, step) for step in range(2)]
        weights[kind] = torch.cat([parameter.detach().flatten() for parameter in run.chain.parameters])
        assert run.denoiser_evaluations > updates[0].rewards.numel() * 2 * run.chain.num_steps
    assert torch.equal(weights["auto"], weights["ode"]) and not torch.equal(weights["auto"], weights["ancestral"])


@pytest.mark.parametrize("name", NOISY)
def test_noise_stays_where_it_is_needed_or_asked_for(workplace: Path, tmp_path: Path, name: str) -> None:
    run = build(config_file(workplace, tmp_path / "out", **NOISY[name]))
    assert not run.draws_without_noise and run.update_chain is run.chain
    assert sum(run.chain.std(t) > 0 for t in range(1, 5)) >= 2, "step 1 alone may have none"


def test_auto_measures_with_noise_and_trains_as_its_choice_wants(workplace: Path, tmp_path: Path) -> None:
    run = build(config_file(workplace, tmp_path / "out", estimator="auto", calibration_interval=5))
    calibrate(run, 0)
    state = run.estimator.state_dict()
    for chosen, noiseless in (("rlr", False), ("reward gradient through the last step", True)):
        run.estimator.load_state_dict(state | {"chosen": chosen})
        assert run.draws_without_noise == noiseless
        assert run.method_in_words.endswith("images drawn without noise") == noiseless
        before = run.denoiser_evaluations
        take_update(run, 0)
        assert run.denoiser_evaluations - before >= run.samples_per_update * (run.chain.num_steps + 1)
