"""Table and figure of a race: means over seeds with 95 % intervals."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

# How many methods the figure shows, and how far apart their intervals stand, as a share of its width.
DRAWN = 6
APART = 0.012


def report(runs: list[dict[str, Any]], name: str, drawn: Collection[str]) -> list[dict[str, Any]]:
    """One row for the best setting of every method; prints them and draws ``docs/images/{name}.png``.

    The best setting is that with the highest mean gain, among those with the most seeds. Methods that are not `drawn`
    are in the tables alone.
    """
    settings: defaultdict[str, dict[tuple[str, str], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        settings[run["method"]][str(run["batch"]), run["learning_rate"]].append(run)
    best = {method: max(groups.values(), key=_seeds_and_gain) for method, groups in settings.items()}
    winner = max(best.values(), key=lambda group: _gains(group, "reward").mean())
    rows = [_row(group, winner) | {"settings": len(settings[method])} for method, group in best.items()]
    rows.sort(key=lambda row: -row["reward_gain"])
    _print(rows)
    _print_rates(settings)
    shown = [row["method"] for row in rows if row["method"] in drawn][:DRAWN]
    _draw({method: best[method] for method in shown}, Path("docs/images") / f"{name}.png")
    return [{name: None if value != value else value for name, value in row.items()} for row in rows]  # NaN is no JSON


def interval(values: numpy.ndarray) -> float:
    """Half the width of the 95 % confidence interval of the mean (Student's t); NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def _seeds_and_gain(group: list[dict[str, Any]]) -> tuple[int, float]:
    return len(group), float(_gains(group, "reward").mean())


def _gains(group: list[dict[str, Any]], score: str, mark: int = -1) -> numpy.ndarray:
    return numpy.array([run["points"][mark][f"{score}_gain"] for run in group])


def _row(group: list[dict[str, Any]], winner: list[dict[str, Any]]) -> dict[str, Any]:
    first = group[0]
    row: dict[str, Any] = {"method": first["method"], "batch": first["batch"], "learning_rate": first["learning_rate"]}
    row |= {
        "seeds": len(group),
        "marks": [float(_gains(group, "reward", i).mean()) for i in range(len(first["points"]))],
    }
    for score in ("reward", "heldout"):
        gains = _gains(group, score)
        row |= {f"{score}_gain": float(gains.mean()), f"{score}_interval": interval(gains)}
    for number in ("updates", "cpu_seconds", "K"):
        row[number] = float(numpy.mean([run["points"][-1][number] for run in group]))
    behind = _difference(winner, group)
    return row | {"behind_best": float(behind.mean()) if len(behind) else float("nan"), "interval": interval(behind)}


def _difference(winner: list[dict[str, Any]], group: list[dict[str, Any]]) -> numpy.ndarray:
    """How far the group is behind, seed by seed: both see the same prompts, images and noises."""
    gains = {run["seed"]: run["points"][-1]["reward_gain"] for run in group}
    pairs = [run["points"][-1]["reward_gain"] - gains[run["seed"]] for run in winner if run["seed"] in gains]
    return numpy.array(pairs)


def _print(rows: list[dict[str, Any]]) -> None:
    print(
        "| method | batch | rate | seeds | updates | CPU s | gain at 1/4, 2/4, 3/4 | end | held out | behind the best |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {row['batch']} | {row['learning_rate']} | {row['seeds']} | {row['updates']:.0f} | "
            f"{row['cpu_seconds']:.0f} | {', '.join(f'{mark:+.3f}' for mark in row['marks'][:-1])} | "
            f"{row['reward_gain']:+.3f}{_width(row['reward_interval'])} | "
            f"{row['heldout_gain']:+.3f}{_width(row['heldout_interval'])} | "
            f"{row['behind_best']:.3f}{_width(row['interval'])} |"
        )


def _print_rates(settings: dict[str, dict[tuple[str, str], list[dict[str, Any]]]]) -> None:
    """Every setting: the gain of each seed at the end, at every rate."""
    rates = sorted({rate for groups in settings.values() for _, rate in groups})
    print(f"\n| method | batch | {' | '.join(rates)} |\n|---|---|{'---|' * len(rates)}")
    for method, groups in settings.items():
        for batch in sorted({batch for batch, _ in groups}, key=lambda batch: (len(batch), batch)):
            cells = [
                ", ".join(
                    f"{run['points'][-1]['reward_gain']:+.3f} (seed {run['seed']})" for run in groups[batch, rate]
                )
                if (batch, rate) in groups
                else ""
                for rate in rates
            ]
            print(f"| {method} | {batch} | {' | '.join(cells)} |")


def _width(interval: float) -> str:
    return "" if interval != interval else f" ± {interval:.3f}"


def _draw(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = []
    for i, (method, group) in enumerate(groups.items()):
        marks = range(len(group[0]["points"]))
        cost = numpy.array([0.0, *(float(numpy.mean([run["points"][j]["cost"] for run in group])) for j in marks)])
        gains = [0.0, *(float(_gains(group, "reward", j).mean()) for j in marks)]
        axes.plot(cost, gains, marker="o", markersize=3, color=f"C{i}")
        if len(group) > 2:  # the interval of two seeds says nothing and hides all else
            widths = numpy.nan_to_num([0.0, *(interval(_gains(group, "reward", j)) for j in marks)])
            beside = cost + APART * cost[-1] * (i - (len(groups) - 1) / 2)
            axes.errorbar(beside[1:], gains[1:], widths[1:], color=f"C{i}", linestyle="none", linewidth=1, capsize=2)
        ends.append((gains[-1], method, f"C{i}", cost[-1]))
    _label(axes, ends)
    axes.axhline(0, color="#cccccc", linewidth=1, zorder=0)
    axes.set_xlabel("cost in denoiser forwards of one image")
    axes.set_ylabel("gain in reward on unseen prompts")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})


def _label(axes: Any, ends: list[tuple[float, str, str, float]]) -> None:
    """Every line's name at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, place = 0.05 * (high - low), -float("inf")
    last = max(cost for *_, cost in ends)
    for gain, method, color, cost in sorted(ends):
        place = max(gain, place + gap)
        axes.annotate(method, (cost, gain), (1.05 * last, place), color=color, va="center", fontsize=9)
    axes.set_xlim(0, 1.03 * last)
