"""The reward curve, drawn with matplotlib's Agg canvas: no pyplot and hence no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH = 1000  # pixels
DOTS_PER_INCH = 100

INK = "#222222"
QUIET_INK = "#6b6b6b"
GRID_LINE = "#e4e4e4"
ACCENT = "#1f6f8b"
SECOND_ACCENT = "#b5562b"


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
        path: of the PNG.
        records: at least one point, in the order of steps.
        heldout: measurements at validation by name, each with its own panel as its scale may differ.
        reward_name: title of the first panel.

    Returns:
        `path`.
    """
    if not records:
        raise ValueError("expected at least one point for the reward curve, got none")
    panels = {name: points for name, points in (heldout or {}).items() if points}
    heights = [3.0] + [1.7] * len(panels)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)  # inches
    figure = Figure(figsize=(WIDTH / DOTS_PER_INCH, 1.6 + 1.35 * sum(heights)), dpi=DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    with matplotlib.rc_context({"text.parse_math": False}):  # a name with two dollar signs is no formula
        _draw_training_curve(axes[0], records, reward_name)
        for panel, (name, points) in zip(axes[1:], panels.items(), strict=True):
            _draw_points(panel, points, f"{name}, held out")
    axes[-1].set_xlabel("optimiser step", color=QUIET_INK)
    last = max(point.step for points in (records, *panels.values()) for point in points)
    first = min(point.step for points in (records, *panels.values()) for point in points)
    # Room on the right for the label at the line's end.
    axes[-1].set_xlim(first - 0.01 * (last - first) - 0.01, last + 0.17 * max(last - first, 1))
    _add_evaluations_axis(axes[0], records)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})  # the version would change the bytes
    return path


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
    _restrain(axes, f"{name}, training prompts (band: one standard error)")


def _draw_points(axes: Axes, points: Sequence[CurvePoint], title: str) -> None:
    steps, means = [point.step for point in points], [point.mean for point in points]
    errors = [point.standard_error for point in points]
    axes.errorbar(steps, means, yerr=errors, color=SECOND_ACCENT, linewidth=1.2, marker="o", markersize=4, capsize=2)
    _label_end(axes, steps[-1], means[-1], f"{means[-1]:.3g}", SECOND_ACCENT)
    _restrain(axes, title)


def _restrain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(True, color=GRID_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=QUIET_INK, labelsize=10, length=0)


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
