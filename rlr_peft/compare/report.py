"""All that a comparison leaves: the page, tables for the console and as Markdown, figures, and one row per image."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.csv import write_csv
from pyarrow.parquet import write_table

from rlr_peft.compare.comparison import Comparison, notes
from rlr_peft.compare.distances import Estimate
from rlr_peft.compare.figures import figures, save_figure
from rlr_peft.compare.page import write_page
from rlr_peft.durable_files import replacing_file
from rlr_peft.foreign_text import in_text, one_line
from rlr_peft.intervals import with_error
from rlr_peft.redaction import redacted, redacted_values

UNKNOWN = "-"


def estimate_text(estimate: Estimate | None, *, sign: bool = False) -> str:
    """As `with_error`; a dash for None."""
    return UNKNOWN if estimate is None else with_error(estimate.value, estimate.error, sign=sign)


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: above it.
        columns: titles of the columns; numbers stand in all but the first two.
        rows: as many cells as columns each.
        explanation: what the columns are.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    explanation: str


def tables(comparison: Comparison) -> list[Table]:
    """Rewards; and variety with the distance to the base, where features were kept."""
    found = [_reward_table(comparison)]
    return found if comparison.varieties is None else [*found, _variety_table(comparison)]


def console_text(comparison: Comparison) -> str:
    """All tables and notes as plain text."""
    parts = [f"{table.title}\n{_aligned(table)}" for table in tables(comparison)]
    found = "\n".join(f"- {note}" for note in notes(comparison))
    return "\n\n".join([*parts, found] if found else parts)


def markdown(comparison: Comparison) -> str:
    """All facts, notes and tables as one Markdown document."""
    facts = [f"- **{name}:** {in_text(value)}" for name, value in comparison.facts.items()]
    found = [f"- {in_text(note)}" for note in notes(comparison)]
    parts = ["# Base against adapters", "\n".join(facts), "\n".join(found)]
    for table in tables(comparison):
        parts += [f"## {table.title}", markdown_table(table), table.explanation]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """One table in GitHub's Markdown."""
    lines = ["---"] * 2 + ["---:"] * (len(table.columns) - 2)
    rows = [[in_text(cell).replace("|", "\\|") for cell in row] for row in (table.columns, lines, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _reward_table(comparison: Comparison) -> Table:
    rows = []
    for reward in comparison.rewards:
        name = f"{reward.name} (held out)" if reward.heldout else reward.name
        first = comparison.gains[0][reward.key]
        rows.append([name, comparison.base.label, with_error(first["before"], first["before_se"]), UNKNOWN, UNKNOWN])
        for adapter, gains in zip(comparison.adapters, comparison.gains, strict=True):
            values = gains[reward.key]
            gain = with_error(values["gain"], values["gain_se"], sign=True)
            after = with_error(values["after"], values["after_se"])
            rows.append([name, adapter.label, after, gain, f"{values['win_rate']:.1%}"])
    count = len(comparison.base.evaluation.prompts)
    return Table(
        f"Rewards ({count} images each)",
        ("reward", "model", "mean", "paired difference", "win rate"),
        rows,
        "Mean and standard error over the images; images of one prompt are taken together, as they are alike. The "
        "difference is taken image by image, adapter minus base at the same prompt and seed; its error is the paired "
        "one. The win rate is the share of images that scored higher "
        "than the base's, ties counting one half.",
    )


def _variety_table(comparison: Comparison) -> Table:
    assert comparison.varieties is not None
    has_kl = any(divergence is not None for divergence in comparison.divergences)
    rows = []
    for model, found, kl in zip(comparison.models, comparison.varieties, [None, *comparison.divergences], strict=True):
        rows.append(
            [
                "",
                model.label,
                estimate_text(found.within_prompt),
                estimate_text(found.within_prompt_change, sign=True),
                estimate_text(found.overall),
                estimate_text(found.overall_change, sign=True),
                estimate_text(found.to_base),
                *([estimate_text(kl)] if has_kl else []),
            ]
        )
    kl_text = (
        " KL is the divergence of the sampled path from the base's, the closed-form KL of every step summed over the "
        "chain, in nats."
        if has_kl
        else ""
    )
    columns = ["", "model", "within a prompt", "change", "all images", "change", "to the base's image"]
    columns += ["KL (nats)"] if has_kl else []
    within = "between the images of one prompt, "
    if all(found.within_prompt is None for found in comparison.varieties):  # one image of every prompt
        columns, rows, within = columns[:2] + columns[4:], [row[:2] + row[4:] for row in rows], ""
    return Table(
        "Variety and distance to the base",
        columns,
        rows,
        f"Mean cosine distance of image features ({comparison.features}): {within}between all images, and between an "
        "image and the base's at the same prompt and seed. Less variety than the base's is what collapse looks "
        f"like.{kl_text}",
    )


def _aligned(table: Table) -> str:
    lines = [[one_line(cell) for cell in row] for row in (table.columns, *table.rows)]
    shown = [index for index in range(len(table.columns)) if any(line[index] for line in lines)]
    widths = [max(len(line[index]) for line in lines) for index in shown]
    texts = []
    for line in lines:
        cells = [
            line[index].ljust(width) if index < 2 else line[index].rjust(width)
            for index, width in zip(shown, widths, strict=True)
        ]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


SCORES = "scores"


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


def write_numbers(path: Path, comparison: Comparison) -> Path:
    """Writes all summaries as JSON; null where a number does not exist."""
    with replacing_file(path) as aside:
        text = json.dumps(redacted_values(plain_numbers(comparison)), indent=2, ensure_ascii=False, allow_nan=False)
        aside.write_text(f"{text}\n", encoding="utf-8")
    return path


def plain_numbers(comparison: Comparison) -> dict[str, Any]:
    """All summaries in plain types."""
    names = {reward.key: reward.name for reward in comparison.rewards}
    varieties = comparison.varieties
    adapters = []
    for index, (adapter, gains) in enumerate(zip(comparison.adapters, comparison.gains, strict=True)):
        adapters.append(
            {
                "label": adapter.label,
                "rewards": {names[key]: _plain(gains[key]) for key in names},
                "attributes": {
                    names[key]: {name.removeprefix(f"{key}/"): _plain(gains[name]) for name in found}
                    for key, found in comparison.attributes.items()
                },
                "variety": None if varieties is None else _plain(asdict(varieties[index + 1])),
                "kl": _estimate(comparison.divergences[index]),
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
            "variety": None if varieties is None else _plain(asdict(varieties[0])),
        },
        "adapters": adapters,
        "notes": notes(comparison),
    }


def _estimate(estimate: Estimate | None) -> Any:
    return None if estimate is None else _plain(asdict(estimate))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


PAGE, NUMBERS, MARKDOWN = "compare.html", "compare.json", "compare.md"
FIGURES = "figures"


def write_report(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes `compare.html`, `compare.json`, `compare.md`, `scores.parquet`, `scores.csv` and `figures/*.png`.

    Returns:
        Their paths, the page first.
    """
    drawn = figures(comparison)
    saved = [save_figure(folder / FIGURES / f"{name}.png", figure) for name, figure in drawn.items()]
    with replacing_file(folder / MARKDOWN) as aside:
        aside.write_text(redacted(markdown(comparison)), encoding="utf-8")
    return [
        write_page(folder / PAGE, comparison, drawn),
        write_numbers(folder / NUMBERS, comparison),
        folder / MARKDOWN,
        *write_scores(folder, comparison),
        *saved,
    ]


def write_page_and_scores(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes only `compare.html`, `scores.parquet` and `scores.csv`, for a folder that holds much else; their paths."""
    return [write_page(folder / PAGE, comparison, figures(comparison)), *write_scores(folder, comparison)]
