"""Figures: sizes, contents at known places, and the numbers behind the curve."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_peft.figures import CurvePoint, image_grid, running_mean, save_before_after, save_image_grid, save_reward_curve

RED, BLUE = (255, 0, 0), (0, 0, 255)


def flat_images(count: int, color: tuple[int, int, int], height: int = 16, width: int = 16) -> torch.Tensor:
    return (torch.tensor(color).float() / 255)[None, :, None, None].expand(count, 3, height, width).clone()


def share(picture: Image.Image, color: tuple[int, int, int]) -> float:
    """Share of the pixels that have exactly this colour."""
    return float((np.asarray(picture.convert("RGB")) == color).all(axis=2).mean())


def test_a_grid_is_1000_pixels_wide_and_shows_every_image() -> None:
    images = torch.cat([flat_images(3, RED), flat_images(2, BLUE)])
    picture = image_grid(images, columns=4)
    cell = (1000 - 2 * 24 - 3 * 16) // 4
    assert picture.size == (1000, 2 * 24 + 2 * cell + 16)
    assert share(picture, RED) == pytest.approx(3 * cell**2 / (picture.width * picture.height), rel=1e-6)
    assert share(picture, BLUE) == pytest.approx(2 * cell**2 / (picture.width * picture.height), rel=1e-6)
    assert picture.getpixel((24 + cell + 16, 24)) == RED
    assert picture.getpixel((24, 24 + cell + 16)) == BLUE  # the fifth image starts the second row


def test_images_keep_their_proportions() -> None:
    picture = image_grid(flat_images(1, RED, height=8, width=16))
    assert picture.size == (1000, 2 * 24 + (1000 - 48) // 2)


def test_captions_are_drawn_inside_their_cell_whatever_their_length() -> None:
    images = flat_images(4, RED)
    bare = image_grid(images, columns=4)
    captions = ["short", "many words " * 10, "x" * 300, "日本の猫 🐈"]
    captioned = image_grid(images, captions, columns=4)
    assert captioned.height > bare.height + 5 * 20
    ink = np.asarray(captioned.convert("L"))[24 + (1000 - 96) // 4 :] < 128
    cell = (1000 - 2 * 24 - 3 * 16) // 4
    for column in range(4):
        left = 24 + column * (cell + 16)
        assert ink[:, left : left + cell].any()
        assert not ink[:, left + cell + 2 : left + cell + 14].any()  # the gap stays white


@pytest.mark.parametrize("columns", [8, 32, 100])
def test_any_number_of_columns_fits(columns: int) -> None:
    grid = image_grid(torch.rand(columns, 3, 8, 8), ["Wide Words"] * columns, columns=columns)
    assert grid.width == 1000
    rows = -(-columns // 8)
    assert grid.height >= rows * 96


@pytest.mark.parametrize("prompt", ["word " * 3000, "W" * 30_000, "\N{CJK UNIFIED IDEOGRAPH-8BCD}" * 30_000])
def test_a_prompt_of_any_length_is_cut_after_twelve_lines(prompt: str) -> None:
    start = time.process_time()
    short, long = (image_grid(torch.rand(1, 3, 8, 8), [text], columns=1).height for text in ("a cat", prompt))
    assert long == short + 11 * 20
    assert time.process_time() - start < 5


def test_a_grid_is_written_as_png(tmp_path: Path) -> None:
    path = save_image_grid(tmp_path / "new" / "grid.png", flat_images(2, BLUE), ["a", "b"])
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert share(picture, BLUE) > 0.5


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    path = save_before_after(
        tmp_path / "pairs.png", flat_images(4, RED), flat_images(4, BLUE), ["a prompt"] * 4, [0.1] * 4, [0.9] * 4
    )
    with Image.open(path) as picture:
        assert picture.width == 1000
        assert share(picture, RED) == share(picture, BLUE) > 0.15
        pixels = np.asarray(picture.convert("RGB"))
    row = pixels[30]
    colors = ["R" if tuple(pixel) == RED else "B" if tuple(pixel) == BLUE else " " for pixel in row]
    assert "".join(colors).split() == ["R" * 146, "B" * 146] * 3


def test_the_figures_text_depends_on_the_scores(tmp_path: Path) -> None:
    arguments = (flat_images(1, RED), flat_images(1, BLUE), ["a prompt"])
    better = save_before_after(tmp_path / "better.png", *arguments, [0.1], [0.9]).read_bytes()
    worse = save_before_after(tmp_path / "worse.png", *arguments, [0.9], [0.1]).read_bytes()
    assert better != worse
    assert better == save_before_after(tmp_path / "again.png", *arguments, [0.1], [0.9]).read_bytes()


def test_entries_must_match_the_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one entry of captions per image, got 1 for 2"):
        image_grid(flat_images(2, RED), ["a"])
    with pytest.raises(ValueError, match="scores_after"):
        save_before_after(tmp_path / "x.png", flat_images(2, RED), flat_images(2, RED), ["a", "b"], [1, 2], [1])
    with pytest.raises(ValueError, match="at least one image"):
        image_grid(torch.empty(0, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def curve(steps: int, counted: bool = True) -> list[CurvePoint]:
    return [CurvePoint(step, step / 10, 0.02, step * 640.0 if counted else None) for step in range(1, steps + 1)]


def colors_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("steps", [1, 2, 3, 500])
def test_a_curve_is_drawn_for_any_number_of_steps(tmp_path: Path, steps: int) -> None:
    path = save_reward_curve(tmp_path / "curve.png", curve(steps), reward_name="mine")
    pixels = colors_of(path)
    assert pixels.shape[1] == 1000
    assert 450 < pixels.shape[0] < 700
    accent = np.abs(pixels - (0x1F, 0x6F, 0x8B)).sum(axis=2) < 30
    assert accent.sum() > 50
    assert (pixels[0] == 255).all()  # white background


def test_a_rising_reward_is_drawn_rising(tmp_path: Path) -> None:
    pixels = colors_of(save_reward_curve(tmp_path / "curve.png", curve(30)))
    accent = np.abs(pixels - (0x1F, 0x6F, 0x8B)).sum(axis=2) < 30
    rows, columns = np.nonzero(accent[:, :800])
    assert np.corrcoef(columns, rows)[0, 1] < -0.9  # rows count downwards


def test_held_out_points_get_a_panel_of_their_own(tmp_path: Path) -> None:
    heldout = {"other judge": [CurvePoint(0, 100.0, 1.0), CurvePoint(10, 120.0, 1.0)], "nothing measured": []}
    alone = colors_of(save_reward_curve(tmp_path / "alone.png", curve(10)))
    both = colors_of(save_reward_curve(tmp_path / "both.png", curve(10), heldout))
    assert both.shape[0] > alone.shape[0] + 150
    second = np.abs(both - (0xB5, 0x56, 0x2B)).sum(axis=2) < 30
    assert second.sum() > 200
    assert np.nonzero(second)[0].min() > alone.shape[0] * 0.7  # below the training curve
    assert not (np.abs(alone - (0xB5, 0x56, 0x2B)).sum(axis=2) < 30).any()


def test_counted_denoiser_evaluations_add_an_axis(tmp_path: Path) -> None:
    with_axis = colors_of(save_reward_curve(tmp_path / "with.png", curve(10)))
    without = colors_of(save_reward_curve(tmp_path / "without.png", curve(10, counted=False)))
    assert not np.array_equal(with_axis, without)


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    first = save_reward_curve(tmp_path / "a.png", curve(10)).read_bytes()
    assert first == save_reward_curve(tmp_path / "b.png", curve(10)).read_bytes()


def test_no_points_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one point"):
        save_reward_curve(tmp_path / "x.png", [])


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    pyplot_before = "matplotlib.pyplot" in sys.modules
    save_reward_curve(tmp_path / "curve.png", curve(3))
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before


def test_running_mean_is_numpys() -> None:
    values = np.random.default_rng(0).normal(size=30)
    expected = [values[max(0, end - 5) : end].mean() for end in range(1, 31)]
    assert running_mean(values.tolist(), 5) == pytest.approx(expected)
