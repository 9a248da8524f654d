"""The figures of a run: image grids, base and adapter side by side, the reward curve; videos as files and as strips.

Grids are put together pixel by pixel with PIL. Curves are drawn with matplotlib's Agg canvas: no pyplot and hence no
global state.
"""

from __future__ import annotations

import io
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from diffusers.utils import export_to_gif, export_to_video
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rlr_peft.files import replacing_file
from rlr_peft.foreign_text import printable
from rlr_peft.reports import decimals_of_scores
from rlr_peft.rewards.preprocessing import to_8_bit

WIDTH = 1000  # pixels
DOTS_PER_INCH = 100  # of curves
MARGIN = 24  # pixels
PAIRS_PER_ROW = 3
GAP = 16  # pixels between cells
FONT_SIZE = 15  # pixels
LINE_HEIGHT = 20  # pixels
SMALLEST_CELL = 96  # pixels; more columns than fit are wrapped
MOST_LINES = 12  # of a caption; a longer one ends in dots

INK = "#222222"
QUIET_INK = "#6b6b6b"
GRID_LINE = "#e4e4e4"
ACCENT = "#1f6f8b"
SECOND_ACCENT = "#b5562b"
SHADE = "#f1f1f1"
BASE_COLOR = "#8c939c"
ADAPTER_COLORS = (ACCENT, SECOND_ACCENT, "#6f8f2f", "#7b5ea7", "#b08a00", "#3c5a99")
# What stands for them on a page, light or dark: `house.css`.
VARIABLES = {
    INK: "--ink",
    QUIET_INK: "--quiet",
    GRID_LINE: "--line",
    SHADE: "--panel",
    BASE_COLOR: "--base",
    **{color: f"--adapter-{index}" for index, color in enumerate(ADAPTER_COLORS)},
}

FRAMES_OF_STRIP = 4


def as_images(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as they are; of videos (N, F, 3, H, W) up to four frames, first to last, side by side."""
    if images.ndim == 4:
        return images
    count = min(FRAMES_OF_STRIP, images.shape[1])
    chosen = torch.linspace(0, images.shape[1] - 1, count).round().long()
    return torch.cat(list(images[:, chosen].unbind(1)), dim=-1)


def save_image(path: Path, image: Tensor | Image.Image) -> Path:
    """Writes an image, (3, H, W) in [0, 1] or PIL's, as a PNG file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(to_8_bit(image)) if isinstance(image, Tensor) else image
    picture.save(path, format="PNG")
    return path


def image_grid(
    images: Tensor, captions: Sequence[str] | None = None, columns: int = 4, title: str | None = None
) -> Image.Image:
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
    top = MARGIN + (LINE_HEIGHT + 8 if title else 0)
    height = top + MARGIN + len(rows) * tiles[0].height + sum(text_heights) + (len(rows) - 1) * GAP
    canvas = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title or "", INK, _font(bold=True))
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (cell + GAP)
            canvas.paste(tiles[index], (left, top))
            for line, text in enumerate(wrapped[index]):
                draw.text((left, top + tiles[index].height + 6 + line * LINE_HEIGHT), text, INK, _font())
        top += tiles[0].height + text_height + GAP
    return canvas


def save_image_grid(
    path: Path, images: Tensor, captions: Sequence[str] | None = None, columns: int = 4, title: str | None = None
) -> Path:
    """`image_grid` into a PNG file; returns its path."""
    return save_image(path, image_grid(images, captions, columns, title))


def save_before_after(
    path: Path,
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    scores_before: Sequence[float],
    scores_after: Sequence[float],
) -> Path:
    """Base and adapter side by side for each prompt, with the score under each image and the prompt below.

    Args:
        before: (N, 3, H, W) in [0, 1], drawn by the base.
        after: (N, 3, H, W) in [0, 1], drawn with the adapter from the same noise.
        scores_before: N scores of `before`.
        scores_after: N scores of `after`.

    Returns:
        `path`.
    """
    _check_lengths(before, after=after, prompts=prompts, scores_before=scores_before, scores_after=scores_after)
    columns = min(PAIRS_PER_ROW, len(before))
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
                zip(pairs[index], ("base", "adapter"), (scores_before, scores_after), strict=True)
            ):
                x = left + side * (cell + 4)
                canvas.paste(tile, (x, top))
                better = side == 1 and scores_after[index] > scores_before[index]
                color = ACCENT if better else INK
                _draw_score(draw, x, top + image_height + 6, label, f"{scores[index]:.{decimals}f}", color)
            for line, text in enumerate(wrapped[index]):
                draw.text((left, top + image_height + 6 + (line + 1) * LINE_HEIGHT), text, QUIET_INK, _font())
        top += image_height + text_height + GAP
    return save_image(path, canvas)


def _draw_score(draw: ImageDraw.ImageDraw, x: int, y: int, label: str, score: str, color: str) -> None:
    draw.text((x, y), f"{label} ", QUIET_INK, _font())
    draw.text((x + _font().getlength(f"{label} "), y), score, color, _font(bold=True))


def _scaled(image: Tensor, width: int) -> Image.Image:
    """One (3, H, W) image in [0, 1] at the width of a cell."""
    picture = Image.fromarray(to_8_bit(image))
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


@dataclass(frozen=True)
class CurvePoint:
    """One measurement of a reward during training.

    Attributes:
        step: optimiser steps done.
        mean: mean reward of the images of that step.
        standard_error: of the mean; 0 draws no band.
        denoiser_evaluations: denoiser evaluations since the start of training, or None if not counted.
    """

    step: int
    mean: float
    standard_error: float = 0.0
    denoiser_evaluations: float | None = None


def save_reward_curve(
    path: Path,
    records: Sequence[CurvePoint],
    heldout: Mapping[str, Sequence[CurvePoint]] | None = None,
    *,
    reward_name: str = "reward",
) -> Path:
    """The reward of the training images against optimiser steps; held-out measurements in panels of their own.

    The band is one standard error of each step's mean; the thick line is the mean of the last tenth of the steps so
    far (at least 5, at most 50 steps). Where the points count denoiser evaluations, a second axis on top shows them.

    Args:
        records: at least one point, in the order of steps.
        heldout: measurements at validation by name, each with its own panel as its scale may differ.

    Returns:
        `path`.
    """
    if not records:
        raise ValueError("expected at least one point for the reward curve, got none")
    panels = {name: points for name, points in (heldout or {}).items() if points}
    heights = [3.0] + [1.7] * len(panels)
    figure = empty_figure(1.6 + 1.35 * sum(heights), w_pad=0.15, h_pad=0.12)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    with matplotlib.rc_context({"text.parse_math": False}):  # a name with two dollar signs is no formula
        _draw_training_curve(axes[0], records, reward_name)
        for panel, (name, points) in zip(axes[1:], panels.items(), strict=True):
            _draw_points(panel, points, f"{name}, held out")
    axes[-1].set_xlabel("optimiser step", color=QUIET_INK)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    last = max(point.step for points in (records, *panels.values()) for point in points)
    first = min(point.step for points in (records, *panels.values()) for point in points)
    # Room on the right for the label at the line's end.
    axes[-1].set_xlim(first - 0.01 * (last - first) - 0.01, last + 0.17 * max(last - first, 1))
    _add_evaluations_axis(axes[0], records)
    return save_figure(path, figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, `window` values at the most."""
    return [math.fsum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1)]


def _draw_training_curve(axes: Axes, records: Sequence[CurvePoint], name: str) -> None:
    steps, means = [point.step for point in records], [point.mean for point in records]
    window = min(50, max(5, len(records) // 10))
    smooth = running_mean(means, window)
    axes.fill_between(
        steps,
        [point.mean - point.standard_error for point in records],
        [point.mean + point.standard_error for point in records],
        color=ACCENT,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(steps, means, color=ACCENT, linewidth=0.8, alpha=0.55, marker="." if len(steps) < 60 else None)
    axes.plot(steps, smooth, color=ACCENT, linewidth=2.2)
    _label_end(axes, steps[-1], smooth[-1], f"{smooth[-1]:.3g}\nmean of {min(window, len(steps))} steps", ACCENT)
    restrain(axes, f"{name}, training prompts (band: one standard error)")


def _draw_points(axes: Axes, points: Sequence[CurvePoint], title: str) -> None:
    steps, means = [point.step for point in points], [point.mean for point in points]
    errors = [point.standard_error for point in points]
    axes.errorbar(steps, means, yerr=errors, color=SECOND_ACCENT, linewidth=1.2, marker="o", markersize=4, capsize=2)
    _label_end(axes, steps[-1], means[-1], f"{means[-1]:.3g}", SECOND_ACCENT)
    restrain(axes, title)


def empty_figure(height: float, *, w_pad: float, h_pad: float) -> Figure:
    """A figure without axes, 1000 pixels wide; height and the pads between panels are in inches."""
    layout = ConstrainedLayoutEngine(w_pad=w_pad, h_pad=h_pad)
    figure = Figure(figsize=(WIDTH / DOTS_PER_INCH, height), dpi=DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def restrain(axes: Axes, title: str, grid: Literal["x", "y", "both"] = "both", title_pad: float = 6) -> None:
    """The title on the left, a light grid along one axis or both, and no frame."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=title_pad)
    axes.grid(True, axis=grid, color=GRID_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", colors=QUIET_INK, labelsize=10, length=0)


def save_figure(path: Path, figure: Figure) -> Path:
    """Writes a PNG on white; returns its path."""
    with replacing_file(path) as aside:
        figure.savefig(aside, facecolor="white", metadata={"Software": None})  # the version would change the bytes
    return path


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an `<svg>` element without background, with text as text and the page's variables as colours.

    Args:
        name: different for every figure of a page: ids inside are made of it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:id|gid)="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|PolyCollection)[^"]*"', "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    opening = Markup('<svg role="img" aria-label="{}"').format(label)
    return opening + Markup(printable(svg.removeprefix("<svg")))


def _label_end(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    axes.annotate(text, (x, y), (8, 0), textcoords="offset points", va="center", fontsize=10, color=color)


def _add_evaluations_axis(axes: Axes, records: Sequence[CurvePoint]) -> None:
    counted = [(p.step, p.denoiser_evaluations) for p in records if p.denoiser_evaluations is not None]
    if len(counted) < 2:
        return
    top = axes.secondary_xaxis("top")
    # About six labels at measured steps: the axis stays true when steps differ in cost.
    chosen = [counted[round(index * (len(counted) - 1) / 5)] for index in range(6)]
    chosen = list(dict.fromkeys(chosen))
    top.set_xticks([step for step, _ in chosen], [_short_count(count) for _, count in chosen])
    top.set_xlabel("denoiser evaluations", color=QUIET_INK)
    top.tick_params(colors=QUIET_INK, labelsize=10, length=0)
    top.spines[:].set_visible(False)


def _short_count(count: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def save_video(path: Path, video: Tensor, fps: int) -> Path:
    """Writes a video as `.mp4` where imageio and its ffmpeg are installed, else as `.gif`.

    Args:
        path: of the file, without suffix; its folder is created.
        video: (F, 3, H, W) in [0, 1].
        fps: frames per second.

    Returns:
        The file's path.
    """
    frames = [Image.fromarray(frame) for frame in to_8_bit(video)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if find_spec("imageio") and find_spec("imageio_ffmpeg"):
        return Path(export_to_video(frames, str(path.with_suffix(".mp4")), fps=fps))
    return Path(export_to_gif(frames, str(path.with_suffix(".gif")), fps=fps))
