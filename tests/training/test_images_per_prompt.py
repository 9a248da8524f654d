"""How many images of a prompt an update draws, where that is left to the method."""

from pathlib import Path

import pytest

from rlr_peft.training import calibrate, take_update
from tests.training.runs import build, config_file

BLACK_BOX = {"reward_fn": "jpeg-compressibility"}
DRAWN = {
    "full-bp": ({"estimator": "full-bp"}, 1),
    "full-bp, mirrored noise": ({"estimator": "full-bp", "antithetic": True}, 4),
    "adjoint-matching": ({"estimator": "adjoint-matching"}, 1),
    "adjoint-matching, mirrored noise": ({"estimator": "adjoint-matching", "antithetic": True}, 4),
    "grpo": ({"estimator": "grpo"}, 4),
    "rlr through all steps": ({"estimator": "rlr", "fo_steps": 4}, 1),
    "rlr with score terms": ({"estimator": "rlr", "fo_steps": 1}, 4),
    "rlr without gradient": ({"estimator": "rlr", **BLACK_BOX}, 4),
    "auto": ({"estimator": "auto"}, 1),
    "auto, mirrored noise": ({"estimator": "auto", "antithetic": True}, 4),
    "auto without gradient": ({"estimator": "auto", **BLACK_BOX}, 4),
    "as many as divide the update": ({"estimator": "grpo", "gradient_accumulation_steps": 3}, 3),
    "as given": ({"estimator": "full-bp", "num_images_per_prompt": 2}, 2),
}


@pytest.mark.parametrize("name", DRAWN)
def test_images_of_a_prompt_are_drawn_where_they_are_compared(workplace: Path, tmp_path: Path, name: str) -> None:
    values, expected = DRAWN[name]
    run = build(config_file(workplace, tmp_path / "out", **{"num_images_per_prompt": "auto", **values}))
    if run.estimator.wants_calibration(run.objective.has_gradient):
        calibrate(run, 0)
    drawn = [prompt for book in take_update(run, 0).books for prompt in book.prompts]
    assert len(drawn) == run.samples_per_update
    groups = [drawn[i : i + expected] for i in range(0, len(drawn), expected)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) == len(groups), "the prompts of the file are more than those"
    assert run.num_images_per_prompt == expected


def test_images_of_a_prompt_share_their_noises_whatever_the_micro_batches(workplace: Path, tmp_path: Path) -> None:
    """Forward-process methods: four images at once, or two and two, make the same update."""
    norms = []
    for size, name in ((4, "one"), (2, "two")):
        values = {"estimator": "awm", "num_images_per_prompt": 4, "train_batch_size": size, "noise_levels": 2}
        run = build(
            config_file(workplace, tmp_path / name, **values, gradient_accumulation_steps=8 // size, **BLACK_BOX)
        )
        norms.append(take_update(run, 0).gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0] > 0
