"""All that a comparison leaves: the page, tables for the console and as Markdown, figures, and one row per image."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.csv import write_csv
from pyarrow.parquet import write_table

from rlr_peft.compare.comparison import Comparison, notes
from rlr_peft.compare.figures import figures
from rlr_peft.compare.page import page
from rlr_peft.compare.tables import markdown
from rlr_peft.durable_files import replacing_file
from rlr_peft.figures import save_figure
from rlr_peft.reports import write_numbers, write_text

PAGE, NUMBERS, MARKDOWN = "compare.html", "compare.json", "compare.md"
FIGURES, SCORES = "figures", "scores"


def score_columns(comparison: Comparison) -> dict[str, list[Any]]:
    """One row per model and image: model, prompt, seed, the rewards' scores and info by name, and the image's file."""
    columns: dict[str, list[Any]] = {"model": [], "prompt": [], "seed": []}
    names = {reward.key: reward.name for reward in comparison.rewards}
    info = [
        name
        for key, found in comparison.attributes.items()
        for name in found
        if f"{names[key]}/{name.removeprefix(f'{key}/')}" not in names.values()  # measured as a reward of its own
    ]
    for model in comparison.models:
        evaluation = model.evaluation
        columns["model"] += [model.label] * len(evaluation.prompts)
        columns["prompt"] += [str(prompt) for prompt in evaluation.prompts]
        columns["seed"] += evaluation.seeds
        for key, name in names.items():
            columns.setdefault(name, []).extend(evaluation.scores[key].tolist())
        for name in info:
            key, _, rest = name.partition("/")
            columns.setdefault(f"{names[key]}/{rest}", []).extend(evaluation.info[name].tolist())
        if all(other.image_files for other in comparison.models):
            columns.setdefault("image", []).extend(model.image_files)
    return columns


def write_scores(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes `scores.parquet` and `scores.csv`; returns their paths."""
    rows = pyarrow.table(score_columns(comparison))
    parquet, csv = folder / f"{SCORES}.parquet", folder / f"{SCORES}.csv"
    with replacing_file(parquet) as aside:
        write_table(rows, aside)
    with replacing_file(csv) as aside:
        write_csv(rows, aside)
    return [parquet, csv]


def plain_numbers(comparison: Comparison) -> dict[str, Any]:
    """All summaries in plain types."""
    names = {reward.key: reward.name for reward in comparison.rewards}
    varieties = comparison.varieties
    adapters = []
    for index, (adapter, gains) in enumerate(zip(comparison.adapters, comparison.gains, strict=True)):
        divergence = comparison.divergences[index]
        adapters.append(
            {
                "label": adapter.label,
                "rewards": {names[key]: gains[key] for key in names},
                "attributes": {
                    names[key]: {name.removeprefix(f"{key}/"): gains[name] for name in found}
                    for key, found in comparison.attributes.items()
                },
                "variety": None if varieties is None else asdict(varieties[index + 1]),
                "kl": None if divergence is None else asdict(divergence),
                "kl_samples": 0 if adapter.divergence is None else len(adapter.divergence),
            }
        )
    return {
        "facts": dict(comparison.facts),
        "heldout": [reward.name for reward in comparison.rewards if reward.heldout],
        "images": len(comparison.base.evaluation.prompts),
        "features": comparison.features,
        "base": {
            "label": comparison.base.label,
            "variety": None if varieties is None else asdict(varieties[0]),
        },
        "adapters": adapters,
        "notes": notes(comparison),
    }


def write_report(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes `compare.html`, `compare.json`, `compare.md`, `scores.parquet`, `scores.csv` and `figures/*.png`.

    Returns:
        Their paths, the page first.
    """
    drawn = figures(comparison)
    saved = [save_figure(folder / FIGURES / f"{name}.png", figure) for name, figure in drawn.items()]
    return [
        write_text(folder / PAGE, page(comparison, drawn)),
        write_numbers(folder / NUMBERS, plain_numbers(comparison)),
        write_text(folder / MARKDOWN, markdown(comparison)),
        *write_scores(folder, comparison),
        *saved,
    ]


def write_page_and_scores(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes only `compare.html`, `scores.parquet` and `scores.csv`, for a folder that holds much else; their paths."""
    return [write_text(folder / PAGE, page(comparison, figures(comparison))), *write_scores(folder, comparison)]
