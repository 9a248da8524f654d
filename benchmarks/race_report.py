"""Tables and figure of a race: means over seeds with 95 % intervals."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

REWARDS = ("reward", "heldout")


def report(
    finals: list[dict[str, Any]], name: str, variants: Mapping[str, tuple[Collection[str], Collection[str]]]
) -> list[dict[str, Any]]:
    """One row per method over its final runs; prints the tables and draws ``docs/images/{name}.png``.

    Args:
        finals: the runs.
        name: of the figure.
        variants: tables of their own, by title: the variants of methods, and the methods to compare them with.
    """
    by_method: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in finals:
        by_method[run["method"]].append(run)
    apart = {method for names, _ in variants.values() for method in names}
    raced = {method: runs for method, runs in by_method.items() if method not in apart}
    time = min(_seconds(runs) for runs in raced.values())
    rows = [_row(method, by_method, time) for method in by_method]
    rows.sort(key=lambda row: -row["reward_gain"])
    _print([row for row in rows if row["method"] in raced], time)
    for title, (names, compared) in variants.items():
        if by_method.keys() & set(names):
            print(f"\n{title}:\n")
            _print([row for row in rows if row["method"] in {*names, *compared}], time)
    _draw(raced, _figure_path(name))
    return rows


def print_long_runs(runs: list[dict[str, Any]]) -> None:
    """Gains in the reward, and in the held-out reward, along the long runs of each method: means over seeds."""
    if not runs:
        return
    groups: defaultdict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["method"], run["learning_rate"]].append(run)
    evaluations = [f"{point['denoiser_evaluations']:,.0f}" for point in runs[0]["points"]]
    print(f"| method | learning rate | seeds | updates | {' | '.join(evaluations)} |")
    print(f"|---|---|---|---{'|---' * len(evaluations)}|")
    for (method, rate), group in sorted(groups.items(), key=lambda item: -_gains(item[1], "reward").mean()):
        along = zip(*(run["points"] for run in group), strict=True)
        means = [[numpy.mean([point[f"{name}_gain"] for point in points]) for name in REWARDS] for points in along]
        updates = numpy.mean([run["points"][-1]["updates"] for run in group])
        gains = [f"{reward:+.3f} ({heldout:+.3f})" for reward, heldout in means]
        print(f"| {method} | {rate:g} | {len(group)} | {updates:.0f} | {' | '.join(gains)} |")
    print()


def _print(rows: list[dict[str, Any]], time: float) -> None:
    equal_time = f"in {time:.0f} CPU s"
    print(f"| method | learning rate | seeds | updates | reward gain | held-out gain | {equal_time} | `rlr` minus it |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {row['learning_rate']:g} | {row['seeds']} | {row['updates']:.0f} | "
            f"{row['reward_gain']:+.4f} ± {row['reward_gain_interval']:.4f} | "
            f"{row['heldout_gain']:+.4f} ± {row['heldout_gain_interval']:.4f} | "
            f"{row['gain_at_equal_time']:+.4f} | "
            f"{row['rlr_ahead']:+.4f} ± {row['rlr_ahead_interval']:.4f} |"
        )


def _figure_path(name: str) -> Path:
    return Path("docs/images") / f"{name}.png"


def _row(method: str, by_method: Mapping[str, list[dict[str, Any]]], time: float) -> dict[str, Any]:
    finals = by_method[method]
    row: dict[str, Any] = {"method": method, "learning_rate": finals[0]["learning_rate"], "seeds": len(finals)}
    for name in ("updates", "cpu_seconds", "K"):
        row[name] = float(numpy.mean([run["points"][-1][name] for run in finals]))
    for name in REWARDS:
        gains = _gains(finals, name)
        row |= {f"{name}_gain": float(gains.mean()), f"{name}_gain_interval": interval(gains)}
    row["gain_at_equal_time"] = float(numpy.mean([_gain_at(run, time) for run in finals]))
    ahead, ahead_interval = _difference(by_method["rlr"], finals)
    return row | {"rlr_ahead": ahead, "rlr_ahead_interval": ahead_interval}


def _seconds(finals: list[dict[str, Any]]) -> float:
    return float(numpy.mean([run["points"][-1]["cpu_seconds"] for run in finals]))


def _gain_at(run: dict[str, Any], time: float) -> float:
    """The run's gain after so many CPU seconds, linear between its evaluations; before training it is 0."""
    seconds = [0.0, *(point["cpu_seconds"] for point in run["points"])]
    gains = [0.0, *(point["reward_gain"] for point in run["points"])]
    return float(numpy.interp(time, seconds, gains))


def interval(values: numpy.ndarray) -> float:
    """Half the width of the 95 % confidence interval of the mean (Student's t)."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def _gains(finals: list[dict[str, Any]], name: str) -> numpy.ndarray:
    return numpy.array([run["points"][-1][f"{name}_gain"] for run in finals])


def _difference(first: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean difference of the reward gains, paired by seed: both see the same prompts, images and noises."""
    gains = {run["seed"]: run["points"][-1]["reward_gain"] for run in other}
    pairs = [run["points"][-1]["reward_gain"] - gains[run["seed"]] for run in first if run["seed"] in gains]
    return float(numpy.mean(pairs)), interval(numpy.array(pairs))


def _draw(by_method: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for (axis, label), axes in zip(
        (("denoiser_evaluations", "denoiser evaluations"), ("cpu_seconds", "CPU seconds")), panels, strict=True
    ):
        for i, (method, finals) in enumerate(sorted(by_method.items())):
            x = numpy.array([[0, *(point[axis] for point in run["points"])] for run in finals]).mean(0)
            y = numpy.array([[0, *(point["reward_gain"] for point in run["points"])] for run in finals]).mean(0)
            axes.plot(
                x, y, marker="o", markersize=3, label=method, color=f"C{i % 10}", linestyle="-" if i < 10 else ":"
            )
        axes.axhline(0, color="#cccccc", linewidth=1, zorder=0)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gain in reward on unseen prompts")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})
