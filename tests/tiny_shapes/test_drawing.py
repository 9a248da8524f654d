"""Drawings show every attribute and depend on nothing but scene and generator."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.tiny_shapes.drawing import draw
from rlr_peft.tiny_shapes import ATTRIBUTES, Scene

SCENE = Scene("sky", "center", "large", "circle", "red", "plain", "none")


def test_drawing_is_deterministic_given_the_generator() -> None:
    first, second, third = (draw(SCENE, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_changes_the_picture_visibly(attribute: str) -> None:
    pictures = {
        value: draw(replace(SCENE, **{attribute: value}), np.random.default_rng(0)).astype(int)
        for value in ATTRIBUTES[attribute]
    }
    values = list(pictures)
    for number, value in enumerate(values):
        for other in values[:number]:
            difference = np.abs(pictures[value] - pictures[other]).max(axis=2)
            assert (difference > 40).sum() > 40, f"{value} and {other} look alike"


def test_position_moves_the_shape() -> None:
    background = draw(SCENE, np.random.default_rng(0))[0, 0].astype(int)
    for position, (x, y) in {"top left": (-1, -1), "bottom right": (1, 1), "top right": (1, -1)}.items():
        picture = draw(replace(SCENE, position=position), np.random.default_rng(0)).astype(int)
        rows, columns = np.nonzero(np.abs(picture - background).sum(axis=2) > 60)
        assert np.sign(columns.mean() - 31.5) == x
        assert np.sign(rows.mean() - 31.5) == y
