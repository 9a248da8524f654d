"""What the denoiser is trained on: captions, timesteps and drawings."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.tiny_shapes.dataset import build_drawings, scene_at
from benchmarks.tiny_shapes.denoiser import sample_timesteps, training_caption
from rlr_peft.tiny_shapes import ATTRIBUTES, parse_caption, prompts


def shares_of_right_words(confused: bool, rows: int = 3000) -> dict[str, float]:
    """How often each attribute of a training caption is that of the drawing, among captions that are not empty."""
    generator = torch.Generator().manual_seed(0)
    right, captions = dict.fromkeys(ATTRIBUTES, 0), 0
    for row in range(rows):
        found = parse_caption(training_caption(row, 0.0, confused, generator))
        captions += bool(found)
        for attribute, value in found.items():
            right[attribute] += value == getattr(scene_at(row), attribute)
    assert 0.87 < captions / rows < 0.93
    return {attribute: count / captions for attribute, count in right.items()}


def test_captions_are_true_at_first() -> None:
    assert set(shares_of_right_words(confused=False).values()) == {1.0}


def test_only_shape_color_and_texture_are_confused_later() -> None:
    shares = shares_of_right_words(confused=True)
    for attribute in ("background", "position", "size", "outline"):
        assert shares[attribute] == 1.0
    for attribute in ("shape", "color", "texture"):
        assert 0.6 < shares[attribute] < 0.85


def test_partial_captions_leave_attributes_out() -> None:
    generator = torch.Generator().manual_seed(1)
    mentioned = [len(parse_caption(training_caption(row, 0.9, False, generator))) for row in range(300)]
    assert {0, 1, 3, 5, 7} <= set(mentioned)


def test_no_drawing_of_a_test_scene_is_trained_on() -> None:
    training = {scene_at(row).caption() for row in range(0, 80_000, 7)}
    assert not training & set(prompts("test"))


def test_timesteps_cover_the_chain_and_favour_its_start() -> None:
    timesteps = sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 20
    assert timesteps.max() == 999
    assert 0.09 < (timesteps == 999).double().mean() < 0.12


def test_drawing_i_depends_on_seed_and_i_alone(tmp_path: Path) -> None:
    build_drawings(tmp_path / "a.npy", 6, seed=1, processes=1)
    build_drawings(tmp_path / "b.npy", 4, seed=1, processes=1)
    first, second = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert np.array_equal(first[:4], second)
    assert not np.array_equal(first[0], first[1])
