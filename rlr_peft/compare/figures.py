"""The figures of a comparison, drawn with matplotlib's Agg canvas: no pyplot and hence no global state."""

from __future__ import annotations

import math

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rlr_peft.compare.comparison import Comparison, MeasuredReward
from rlr_peft.figures import (
    ADAPTER_COLORS,
    BASE_COLOR,
    INK,
    QUIET_INK,
    empty_figure,
    restrain,
)

FEWEST_BINS, MOST_BINS = 8, 30


def draw_figures(comparison: Comparison) -> dict[str, Figure]:
    """All figures that the comparison has numbers for, by the name of their file without suffix."""
    with matplotlib.rc_context({"text.parse_math": False}):  # a name with two dollar signs is no formula
        found = {
            "rewards": reward_distributions(comparison),
            "reward_kl": reward_against_kl(comparison),
            "attributes": attribute_bars(comparison),
        }
    return {name: figure for name, figure in found.items() if figure is not None}


def reward_distributions(comparison: Comparison) -> Figure:
    """A row per reward: the scores of base and adapters, and the paired differences."""
    figure, rows = _figure(len(comparison.rewards), 2, 2.5)
    for axes, reward in zip(rows, comparison.rewards, strict=True):
        scores = [model.evaluation.scores[reward.key] for model in comparison.models]
        _histograms(axes[0], scores, _colors(comparison))
        restrain(axes[0], f"{_title(reward)}: scores", "y")
        _histograms(axes[1], [after - scores[0] for after in scores[1:]], _colors(comparison)[1:])
        axes[1].axvline(0, color=INK, linewidth=1)
        restrain(axes[1], "adapter minus base, image by image", "y")
    _legend(figure, comparison)
    return figure


def reward_against_kl(comparison: Comparison) -> Figure | None:
    """Mean reward against the divergence from the base, a panel per reward; None where no divergence was measured."""
    known = [index for index, divergence in enumerate(comparison.divergences) if divergence is not None]
    if not known:
        return None
    columns = min(2, len(comparison.rewards))
    figure, rows = _figure(-(-len(comparison.rewards) // columns), columns, 3.0)
    panels = [axes for row in rows for axes in row]
    for axes in panels[len(comparison.rewards) :]:
        axes.set_visible(False)
    for axes, reward in zip(panels, comparison.rewards, strict=False):
        base = comparison.gains[0][reward.key]
        axes.axhline(base["before"], color=BASE_COLOR, linewidth=1, linestyle="--")
        _point(axes, 0, 0, base["before"], base["before_se"], BASE_COLOR)
        for index in known:
            divergence, values = comparison.divergences[index], comparison.gains[index][reward.key]
            assert divergence is not None
            error = divergence.error if numpy.isfinite(divergence.error) else 0
            color = _colors(comparison)[index + 1]
            _point(axes, divergence.value, error, values["after"], values["after_se"], color)
        axes.set_xlabel("KL from the base (nats)", color=QUIET_INK)
        axes.margins(x=0.12, y=0.25)
        restrain(axes, f"{_title(reward)}: mean", "y")
    _legend(figure, comparison)
    return figure


def attribute_bars(comparison: Comparison) -> Figure | None:
    """What a reward says beside its score: the paired difference of every such number; None where there is none."""
    groups = comparison.attributes
    if not groups:
        return None
    entries = [(key, name) for key, names in groups.items() for name in names]
    # Numbers in [0, 1] share an axis; others have units of their own.
    shared = all(0 <= comparison.gains[0][name][side] <= 1 for _, name in entries for side in ("before", "after"))
    heights = [len(names) for names in groups.values()] if shared else [1] * len(entries)
    height = 0.2 + 0.12 * len(comparison.adapters)
    figure, rows = _figure(len(heights), 1, height, heights, sharex=shared)
    titles = {reward.key: _title(reward) for reward in comparison.rewards}
    if shared:
        for axes, (key, names) in zip(rows, groups.items(), strict=True):
            _bars(axes[0], comparison, names)
            _restrain_rows(axes[0], f"{titles[key]}: adapter minus base, by attribute")
    else:
        for axes, (key, name) in zip(rows, entries, strict=True):
            _bars(axes[0], comparison, [name])
            _restrain_rows(axes[0], titles[key] if name == groups[key][0] else "")
    _legend(figure, comparison, without_base=True)
    return figure


def _figure(
    rows: int, columns: int, height: float, heights: list[int] | None = None, sharex: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure, 1000 pixels wide, whose rows are `height` inches high, times `heights`."""
    figure = empty_figure(height * sum(heights or [1] * rows) + 0.55 * rows + 0.5, w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, sharex=sharex)
    return figure, axes.tolist()


def _colors(comparison: Comparison) -> list[str]:
    adapters = [ADAPTER_COLORS[index % len(ADAPTER_COLORS)] for index in range(len(comparison.adapters))]
    return [BASE_COLOR, *adapters]


def _histograms(axes: Axes, samples: list[Tensor], colors: list[str]) -> None:
    values = [sample.double().numpy() for sample in samples]
    edges = _edges(numpy.concatenate(values))
    for sample, color in zip(values, colors, strict=True):
        axes.hist(sample, edges, color=color, alpha=0.22, linewidth=0)
        axes.hist(sample, edges, color=color, histtype="step", linewidth=1.6)
    low, high = axes.get_ylim()
    for sample, color in zip(values, colors, strict=True):
        axes.plot([sample.mean()], [high * 0.02], marker="^", markersize=8, color=color, clip_on=False, zorder=5)
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("images", color=QUIET_INK)


def _edges(values: numpy.ndarray) -> list[float]:
    """Bins by the rule of Freedman and Diaconis, 8 to 30 of them: a single outlier would ask for billions."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return [low - 0.5, high + 0.5]
    lower, upper = numpy.quantile(values, [0.25, 0.75])
    width = 2 * (upper - lower) / len(values) ** (1 / 3)
    count = MOST_BINS if width * MOST_BINS <= high - low else max(FEWEST_BINS, math.ceil((high - low) / width))
    return [float(edge) for edge in numpy.linspace(low, high, count + 1)]


def _point(axes: Axes, x: float, x_error: float, y: float, y_error: float, color: str) -> None:
    axes.errorbar([x], [y], [y_error], [x_error], color=color, marker="o", markersize=7, linewidth=1.4, capsize=3)


def _bars(axes: Axes, comparison: Comparison, names: list[str]) -> None:
    count = len(comparison.adapters)
    thickness = 0.8 / count
    for index, (gains, color) in enumerate(zip(comparison.gains, _colors(comparison)[1:], strict=True)):
        places = [row - 0.4 + thickness * (index + 0.5) for row in range(len(names))]
        values = [gains[name]["gain"] for name in names]
        errors = [gains[name]["gain_se"] for name in names]
        axes.barh(places, values, thickness * 0.86, xerr=errors, color=color, error_kw={"ecolor": INK, "capsize": 2})
    axes.axvline(0, color=INK, linewidth=1)
    base = [comparison.gains[0][name]["before"] for name in names]
    labels = [f"{name.partition('/')[2]}  (base {value:.3g})" for name, value in zip(names, base, strict=True)]
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.45, -0.55)


def _legend(figure: Figure, comparison: Comparison, without_base: bool = False) -> None:
    first = 1 if without_base else 0
    handles = [
        Line2D([], [], color=color, linewidth=5, label=model.label)
        for model, color in zip(comparison.models[first:], _colors(comparison)[first:], strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=10, labelcolor=INK)


def _restrain_rows(axes: Axes, title: str) -> None:
    """As `restrain`, of horizontal bars with names."""
    restrain(axes, title, "x")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.tick_params(axis="x", labelbottom=True)  # also above other panels of the same axis


def _title(reward: MeasuredReward) -> str:
    return f"{reward.name}, held out" if reward.heldout else reward.name
