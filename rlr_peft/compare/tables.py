"""The comparison as tables: for the console, as Markdown, and as rows for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlr_peft.compare.comparison import Comparison, notes
from rlr_peft.compare.distances import Estimate
from rlr_peft.foreign_text import in_text
from rlr_peft.intervals import with_error
from rlr_peft.reports import aligned

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
    parts = ["\n".join([table.title, *aligned([table.columns, *table.rows], left=2)]) for table in tables(comparison)]
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
