"""Image grids, put together pixel by pixel with PIL."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path

import torch
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rlr_peft.intervals import decimals_of_scores

WIDTH = 1000  # pixels
MARGIN = 24  # pixels
GAP = 16  # pixels between cells
FONT_SIZE = 15  # pixels
LINE_HEIGHT = 20  # pixels
SMALLEST_CELL = 96  # pixels; more columns than fit are wrapped
MOST_LINES = 12  # of a caption; a longer one ends in dots

INK = "#222222"
QUIET_INK = "#6b6b6b"
ACCENT = "#1f6f8b"


def image_grid(images: Tensor, captions: Sequence[str] | None = None, columns: int = 4) -> Image.Image:
    """A grid of images, 1000 pixels wide.

    Args:
        images: (N, 3, H, W) in [0, 1], N >= 1; scaled to the width of a cell.
        captions: N texts, wrapped under their images, or None.
        columns: images per row, as far as cells of 96 pixels fit.
    """
    _check_lengths(images, captions=captions)
    columns = min(columns, len(images), (WIDTH - 2 * MARGIN + GAP) // (SMALLEST_CELL + GAP))
    cell = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns
    wrapped = [_wrap(caption, cell) for caption in captions] if captions is not None else [[] for _ in images]
    tiles = [_scaled(image, cell) for image in images]
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    text_heights = [_text_height(max(len(wrapped[index]) for index in row)) for row in rows]
    height = 2 * MARGIN + len(rows) * tiles[0].height + sum(text_heights) + (len(rows) - 1) * GAP
    canvas = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (cell + GAP)
            canvas.paste(tiles[index], (left, top))
            for line, text in enumerate(wrapped[index]):
                draw.text((left, top + tiles[index].height + 6 + line * LINE_HEIGHT), text, INK, _font())
        top += tiles[0].height + text_height + GAP
    return canvas


def save_image_grid(path: Path, images: Tensor, captions: Sequence[str] | None = None, columns: int = 4) -> Path:
    """`image_grid` into a PNG file; returns its path."""
    return _save(image_grid(images, captions, columns), path)


def save_before_after(
    path: Path,
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    scores_before: Sequence[float],
    scores_after: Sequence[float],
    *,
    columns: int = 3,
    labels: tuple[str, str] = ("base", "adapter"),
) -> Path:
    """Base and adapter side by side for each prompt, with the score under each image and the prompt below.

    Args:
        path: of the PNG.
        before: (N, 3, H, W) in [0, 1], drawn by the base.
        after: (N, 3, H, W) in [0, 1], drawn with the adapter from the same noise.
        prompts: N prompts.
        scores_before: N scores of `before`.
        scores_after: N scores of `after`.
        columns: pairs per row.
        labels: what stands with the scores of `before` and `after`.

    Returns:
        `path`.
    """
    _check_lengths(before, after=after, prompts=prompts, scores_before=scores_before, scores_after=scores_after)
    columns = min(columns, len(before))
    pair_gap = 2 * GAP if columns > 1 else 0
    pair_width = (WIDTH - 2 * MARGIN - (columns - 1) * pair_gap) // columns
    cell = (pair_width - 4) // 2  # the two images of a pair nearly touch: that is what makes them a pair
    pairs = [(_scaled(old, cell), _scaled(new, cell)) for old, new in zip(before, after, strict=True)]
    wrapped = [_wrap(prompt, pair_width) for prompt in prompts]
    decimals = decimals_of_scores([*scores_before, *scores_after])
    rows = [range(start, min(start + columns, len(pairs))) for start in range(0, len(pairs), columns)]
    text_heights = [_text_height(1 + max(len(wrapped[index]) for index in row)) for row in rows]
    image_height = pairs[0][0].height
    height = 2 * MARGIN + len(rows) * image_height + sum(text_heights) + (len(rows) - 1) * GAP
    canvas = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (pair_width + pair_gap)
            for side, (tile, label, scores) in enumerate(
                zip(pairs[index], labels, (scores_before, scores_after), strict=True)
            ):
                x = left + side * (cell + 4)
                canvas.paste(tile, (x, top))
                better = side == 1 and scores_after[index] > scores_before[index]
                color = ACCENT if better else INK
                _draw_score(draw, x, top + image_height + 6, label, f"{scores[index]:.{decimals}f}", color)
            for line, text in enumerate(wrapped[index]):
                draw.text((left, top + image_height + 6 + (line + 1) * LINE_HEIGHT), text, QUIET_INK, _font())
        top += image_height + text_height + GAP
    return _save(canvas, path)


def _draw_score(draw: ImageDraw.ImageDraw, x: int, y: int, label: str, score: str, color: str) -> None:
    draw.text((x, y), f"{label} ", QUIET_INK, _font())
    draw.text((x + _font().getlength(f"{label} "), y), score, color, _font(bold=True))


def _scaled(image: Tensor, width: int) -> Image.Image:
    """One (3, H, W) image in [0, 1] at the width of a cell."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    height = max(1, round(width * picture.height / picture.width))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, 12 at the most; a word that is longer than a line is cut."""
    lines: list[str] = []
    font, line = _font(), ""
    for word in text.split():
        if len(lines) > MOST_LINES:
            break
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while len(lines) <= MOST_LINES and font.getlength(line) > width:
            # The longest beginning that fits, and one character at least.
            fits = max(1, bisect_right(range(1, len(line)), width, key=lambda end: ceil(font.getlength(line[:end]))))
            lines.append(line[:fits])
            line = line[fits:]
    lines += [line] if line else []
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "\N{HORIZONTAL ELLIPSIS}"]


def _text_height(lines: int) -> int:
    return 6 + lines * LINE_HEIGHT if lines else 0


@lru_cache
def _font(bold: bool = False) -> ImageFont.FreeTypeFont:
    # The font that matplotlib ships, so that grids and curves look alike on every machine.
    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else 400)), FONT_SIZE)


def _check_lengths(images: Tensor, **others: Tensor | Sequence[object] | None) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"expected at least one image as (N, 3, height, width), got {tuple(images.shape)}")
    for name, other in others.items():
        if other is not None and len(other) != len(images):
            raise ValueError(f"expected one entry of {name} per image, got {len(other)} for {len(images)} images")


def _save(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", optimize=True)
    return path
