"""The sheets of validation images: what they say of every image, and that a reward ends no run for them."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from rlr_peft.figures import save_image_grid
from rlr_peft.reports import decimals_of_scores
from rlr_peft.training import save_validation_images, take_update
from tests.training.runs import build, config_file

DRAWN = {"validation_prompt": ["red sky", "sea"], "num_validation_images": 2, "evaluation_batch_size": 3}
PICKY = """
def picky(images, prompts):
    if "sea" in prompts:
        raise ValueError("the sea cannot be judged")
    return images.mean((1, 2, 3))
"""


def images_of(sheet: Path) -> torch.Tensor:
    files = sorted(sheet.with_suffix("").glob("*.png")) or sorted(sheet.with_suffix("").glob("*.webp"))
    arrays = [numpy.asarray(Image.open(file).convert("RGB")) for file in files]
    return torch.from_numpy(numpy.stack(arrays)).permute(0, 3, 1, 2) / 255


def test_a_sheet_has_the_scores_and_those_of_the_base(workplace: Path, tmp_path: Path) -> None:
    run = build(config_file(workplace, tmp_path / "out", estimator="full-bp", learning_rate=0.1, **DRAWN))
    texts = ["red sky", "red sky", "sea", "sea"]
    scores: dict[int, list[float]] = {}
    for step in (0, 1):
        sheet = save_validation_images(run, step, "validation")
        assert sheet is not None
        images = images_of(sheet)
        scores[step] = json.loads(sheet.with_suffix(".json").read_text())["scores"]
        redness = (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
        assert scores[step] == pytest.approx(redness.tolist(), abs=0.02)  # the files are of 8 bits, or compressed
        take_update(run, step)
    assert scores[0] != scores[1]
    shown = decimals_of_scores([*scores[0], *scores[1]])
    assert shown > 3, "enough to tell the images apart"
    old, new = ([f"{score:.{shown}f}" for score in scores[step]] for step in (0, 1))
    assert scores_in(sheet, images, [f"{texts[i]}: {new[i]} (base {old[i]})" for i in range(4)])


def scores_in(sheet: Path, images: torch.Tensor, captions: list[str]) -> bool:
    """Whether the text under the images is this; the images themselves went through a file."""
    expected = save_image_grid(sheet.with_name("expected.png"), images, captions, columns=2, title="After 1 update")
    drawn, wanted = (numpy.asarray(Image.open(path).convert("L")).astype(int) for path in (sheet, expected))
    return drawn.shape == wanted.shape and bool((abs(drawn - wanted) < 64).all())


def test_a_reward_that_cannot_judge_them_leaves_the_scores_out(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    run = build(config_file(workplace, tmp_path / "out", reward_fn=f"{tmp_path / 'picky.py'}:picky", **DRAWN))
    sheet = save_validation_images(run, 0, "validation")
    assert sheet is not None and sheet.exists() and not sheet.with_suffix(".json").exists()
    assert caplog.text.count("The validation images have no scores: ") == 1 and "cannot be judged" in caplog.text
