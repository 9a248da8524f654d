"""A comparison: what base and adapters drew from the same prompts and seeds, what to notice first, and the figures.

They are drawn with matplotlib's Agg canvas: no pyplot and hence no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rlr_peft.compare.distances import Estimate, Variety, estimate_of, variety
from rlr_peft.compare.evaluation import Evaluation, independent_groups, paired_gains
from rlr_peft.config import ConfigError
from rlr_peft.figures import (
    ADAPTER_COLORS,
    BASE_COLOR,
    INK,
    QUIET_INK,
    empty_figure,
    restrain,
)
from rlr_peft.foreign_text import listed, one_line
from rlr_peft.prompt import texts_of
from rlr_peft.reports import direction, half_width, with_error


@dataclass(frozen=True)
class MeasuredReward:
    """A reward of the comparison.

    Attributes:
        key: its name in `Evaluation.scores`.
        name: its name for people.
        heldout: whether it was never trained on.
    """

    key: str
    name: str
    heldout: bool = False


@dataclass(frozen=True)
class Model:
    """The base, or the base with one adapter.

    Attributes:
        label: its name for people, different from the others'.
        evaluation: what it drew, with pictures.
        divergence: KL of sampled paths from the base's in nats, (k,); None where it was not measured.
        image_files: the images' files relative to the report; empty where they are not kept.
    """

    label: str
    evaluation: Evaluation
    divergence: Tensor | None = None
    image_files: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Base and adapters on the same prompts and seeds.

    Attributes:
        rewards: those of the evaluations; the first one decides which images are shown first.
        base: without an adapter.
        adapters: one or more.
        facts: what was compared, in words and without a path of this machine.
        features: by what variety is measured, in words; None if it is not.

    Raises:
        ValueError: no adapter, labels that are not different, or evaluations of different prompts or seeds.
    """

    rewards: Sequence[MeasuredReward]
    base: Model
    adapters: Sequence[Model]
    facts: Mapping[str, str] = field(default_factory=dict)
    features: str | None = None

    def __post_init__(self) -> None:
        labels = [model.label for model in self.models]
        if not self.adapters or len(set(labels)) < len(labels):
            raise ValueError(f"expected one or more adapters with labels of their own, got {', '.join(labels)}")
        known = self.base.evaluation.scores
        missing = [reward.key for reward in self.rewards if reward.key not in known]
        if missing or not self.rewards:
            raise ValueError(f"expected rewards of the evaluations ({', '.join(known)}), got {', '.join(missing)}")
        _ = self.gains  # refuses different prompts and seeds

    @property
    def models(self) -> list[Model]:
        """Base first."""
        return [self.base, *self.adapters]

    @property
    def independent_images(self) -> int:
        """Of how many independent values the errors are: the prompts, or the images of a single one."""
        return max(independent_groups(texts_of(self.base.evaluation.prompts))) + 1

    @cached_property
    def gains(self) -> list[dict[str, dict[str, float]]]:
        """For every adapter the paired comparison with the base, see `paired_gains`."""
        return [paired_gains(self.base.evaluation, adapter.evaluation) for adapter in self.adapters]

    @cached_property
    def varieties(self) -> list[Variety] | None:
        """Of base and adapters; None where no features were kept."""
        if any(model.evaluation.features is None for model in self.models):
            return None
        base = self.base.evaluation
        of_base = variety(_features(base), texts_of(base.prompts))
        of_adapters = [variety(_features(a.evaluation), texts_of(base.prompts), _features(base)) for a in self.adapters]
        return [of_base, *of_adapters]

    @cached_property
    def divergences(self) -> list[Estimate | None]:
        """For every adapter the mean KL from the base in nats; None where it was not measured."""
        return [None if a.divergence is None else estimate_of(a.divergence) for a in self.adapters]

    @property
    def attributes(self) -> dict[str, list[str]]:
        """For every reward that gives numbers beside its score, their names in the comparison."""
        names = [name for name in self.base.evaluation.info if all(name in gains for gains in self.gains)]
        by_reward = {reward.key: [n for n in names if n.startswith(f"{reward.key}/")] for reward in self.rewards}
        return {key: found for key, found in by_reward.items() if found}

    def draws_as_the_base(self, index: int) -> bool:
        """Whether every picture of an adapter is the base's, bit for bit: an adapter without any effect."""
        base, adapter = self.base.evaluation.pictures, self.adapters[index].evaluation.pictures
        return bool(base) and [picture.data for picture in base] == [picture.data for picture in adapter]


def _features(evaluation: Evaluation) -> Tensor:
    assert evaluation.features is not None
    return evaluation.features


BASE = "base"  # the base's label
# Less variety is worth a word from this share on: every adapter that sharpens costs a little.
NOTABLE_LOSS = 0.1
COLLAPSED = 0.6
COLLAPSE = "a collapse"
# Where the base is often wrong, drawing what is asked is less varied too.
LESS_VARIETY = "variety was lost, or mistakes were mended"


def notes(comparison: Comparison) -> list[str]:
    """One sentence or two per finding, for people; empty where nothing stands out."""
    found = []
    for index, adapter in enumerate(comparison.adapters):
        if comparison.draws_as_the_base(index):
            found.append(
                f"{adapter.label} draws exactly the base's images: it has no effect. It may be untrained, or scaled to "
                "zero."
            )
            continue
        found += [f"{adapter.label}: {sentence}" for sentence in _of_adapter(comparison, index)]
    return found


def _of_adapter(comparison: Comparison, index: int) -> list[str]:
    gains = comparison.gains[index]
    count = comparison.independent_images
    signs = {r.key: direction(gains[r.key]["gain"], gains[r.key]["gain_se"], count) for r in comparison.rewards}
    rose, fell = ([r for r in comparison.rewards if signs[r.key] == sign] for sign in (1, -1))
    trained, heldout_rose = _names(rose, heldout=False), _names(rose, heldout=True)
    trained_fell, heldout_fell = _names(fell, heldout=False), _names(fell, heldout=True)
    sentences = []
    if trained and heldout_fell:
        sentences.append(
            f"{listed(trained)} rose while {listed(heldout_fell)}, held out, fell: the mark of reward hacking. "
            "Look at the worst cases."
        )
    elif trained and heldout_rose:
        sentences.append(f"{listed(trained)} rose, and so did {listed(heldout_rose)}, held out.")
    elif trained and any(reward.heldout for reward in comparison.rewards):
        sentences.append(f"{listed(trained)} rose; no held-out reward moved clearly.")
    elif trained:
        sentences.append(f"{listed(trained)} rose; no held-out reward was measured to confirm it.")
    elif heldout_rose:
        sentences.append(f"{listed(heldout_rose)} rose, which is held out.")
    fallen = trained_fell if trained else trained_fell + heldout_fell
    if fallen:
        sentences.append(f"{listed(fallen)} fell.")
    if not rose and not fell:
        intervals = listed([f"{r.name} {_interval(gains[r.key], count)}" for r in comparison.rewards])
        sentences.append(f"no reward changed clearly, as every 95 % interval of a gain contains 0: {intervals}.")
    return sentences + _variety_notes(comparison, index)


def _interval(gain: Mapping[str, float], count: int) -> str:
    """`-0.012 to +0.043`; the gain alone where its error is not known."""
    value, width = gain["gain"], half_width(gain["gain_se"], count)
    return f"{value - width:+.3g} to {value + width:+.3g}" if width > 0 else f"{value:+.3g}"


def _variety_notes(comparison: Comparison, index: int) -> list[str]:
    if comparison.varieties is None:
        return []
    base, adapter = comparison.varieties[0], comparison.varieties[index + 1]
    sentences = []
    for words, before, change in (
        ("images of one prompt", base.within_prompt, adapter.within_prompt_change),
        ("all images", base.overall, adapter.overall_change),
    ):
        if before is None or change is None or before.value <= 0:
            continue
        loss = -change.value / before.value
        if loss > NOTABLE_LOSS and direction(change.value, change.error, change.count) < 0:
            sentences.append(
                f"{words} differ {loss:.0%} less from each other than the base's, whose distance is "
                f"{with_error(before.value, before.error)}: {COLLAPSE if loss > COLLAPSED else LESS_VARIETY}."
            )
    return sentences


def _names(rewards: list[MeasuredReward], heldout: bool) -> list[str]:
    return [reward.name for reward in rewards if reward.heldout == heldout]


def unique_labels(places: Sequence[str]) -> list[str]:
    """The last parts of paths or repositories, as many as it takes to tell them apart.

    Raises:
        ConfigError: one adapter twice.
    """
    parts = [Path(place).parts if Path(place).exists() else tuple(place.split("/")) for place in places]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"--adapter: expected different adapters, got {', '.join(places)}.")
    labels: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        labels = [one_line("/".join(part[-length:]).removesuffix(".safetensors")) for part in parts]
        if len({*labels, BASE}) == len(labels) + 1:
            return labels
    return [f"{label} ({index + 1})" for index, label in enumerate(labels)]


def file_name(label: str) -> str:
    """The label without what a file name cannot hold."""
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in label)[:60]


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
