"""Prompt files of published benchmarks, read as they are: what their columns mean, and what rewards are told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlr_peft.prompts.files import Columns, Row

QUESTION = "question_natural_language"


@dataclass(frozen=True)
class Benchmark:
    """The columns of a benchmark's prompt file.

    Attributes:
        signs: columns by which it is known: all of them are there.
        caption: the column of the prompts.
        metadata: those that rewards get, as far as a row has them.
    """

    signs: frozenset[str]
    caption: str
    metadata: tuple[str, ...]


BENCHMARKS = (
    # DPG-bench, dpg_bench.csv: a row for every question about an image, here and once they are put together
    Benchmark(frozenset({"item_id", "text", QUESTION}), "text", ("item_id", QUESTION)),
    Benchmark(frozenset({"item_id", "text", "questions"}), "text", ("item_id", "questions")),
    # GenEval, evaluation_metadata.jsonl, which the reward `detector` reads
    Benchmark(frozenset({"tag", "include", "prompt"}), "prompt", ("tag", "include", "exclude")),
    # GenEval 2, geneval2_data.jsonl, which `vlm:MODEL` reads
    Benchmark(frozenset({"prompt", "vqa_list"}), "prompt", ("vqa_list", "skills", "atom_count")),
    # DrawBench
    Benchmark(frozenset({"Prompts", "Category"}), "Prompts", ("Category",)),
    # PartiPrompts, PartiPrompts.tsv
    Benchmark(frozenset({"Prompt", "Category", "Challenge"}), "Prompt", ("Category", "Challenge")),
)


def recognised(columns: Columns, names: Iterable[str]) -> Columns:
    """The columns to read of a table: those of a published benchmark, if that is what it is and none were named.

    Args:
        columns: as the config asks.
        names: of the table's columns, or of its first row.
    """
    there = set(names)
    found = next((benchmark for benchmark in BENCHMARKS if benchmark.signs <= there), None)
    if found is None or columns.caption != "text" or columns.metadata:
        return columns
    optional = frozenset(found.metadata) - found.signs
    return replace(columns, caption=found.caption, metadata=found.metadata, optional=optional)


def one_row_a_prompt(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, where those of one image's questions (DPG-bench) become a single one with `questions`."""
    for item, several in groupby(rows, lambda row: row.values.get("item_id") if QUESTION in row.values else None):
        if item is None:
            yield from several
            continue
        first, *others = several
        values = {name: value for name, value in first.values.items() if name != QUESTION}
        questions = [row.values[QUESTION] for row in (first, *others)]
        yield first._replace(values=values | {"questions": questions})
