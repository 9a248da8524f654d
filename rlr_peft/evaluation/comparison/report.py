"""Everything that a comparison leaves: the page, the tables, the figures and one row per image."""

from __future__ import annotations

from pathlib import Path

from rlr_peft.durable_files import replacing_file
from rlr_peft.evaluation.comparison.comparison import Comparison
from rlr_peft.evaluation.comparison.figure_files import save_figure
from rlr_peft.evaluation.comparison.figures import figures
from rlr_peft.evaluation.comparison.files import write_numbers, write_scores
from rlr_peft.evaluation.comparison.page import write_page
from rlr_peft.evaluation.comparison.tables import markdown
from rlr_peft.redaction import redacted

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
