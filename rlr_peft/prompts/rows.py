"""Rows of tables, each with its place, and the prompts in them; those of published benchmarks are read as they are."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rlr_peft.files import MAX_DEPTH, is_nested_too_deep, stays_inside
from rlr_peft.prompt import ConditionImage, Prompt, PromptError

logger = logging.getLogger(__name__)

FLAGS = "--caption_column, --negative_prompt_column, --image_column, --metadata_columns and --dcot_columns"
# Rows by key may bring a column late, but one that this many rows lack is more likely misspelt.
MANY_ROWS = 1000
# What no text holds: signs of another encoding, of files glued together, or of damage.
NEVER_TEXT = re.compile("[\x00\ufeff\ufffe\uffff\ud800-\udfff]")
# Letters and symbols by their category, which draw nothing all the same: Hangul fillers and the empty Braille cell.
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
QUESTION = "question_natural_language"


@dataclass(frozen=True)
class Columns:
    """What the columns of a table hold.

    Attributes:
        caption: the prompts.
        negative_prompt: what guidance steers away from; an empty cell stands for nothing.
        stages: the stage prompts, noise first.
        metadata: passed on to rewards.
        image: the pictures that samples are drawn from.
        optional: columns of these that a whole table may lack.
    """

    caption: str = "text"
    negative_prompt: str | None = None
    stages: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    image: str | None = None
    optional: frozenset[str] = frozenset()

    @property
    def beyond_caption(self) -> tuple[str, ...]:
        """All columns that only a table has."""
        single = [name for name in (self.negative_prompt, self.image) if name is not None]
        return tuple(dict.fromkeys((*single, *self.stages, *self.metadata)))

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that is read."""
        return tuple(dict.fromkeys((self.caption, *self.beyond_caption)))

    def check(self, where: str, names: Iterable[str]) -> None:
        """Raises:
        PromptError: a column is missing among the names; the message lists those that are there.
        """
        names = list(names)
        missing = [name for name in self.all if name not in names and name not in self.optional]
        if missing:
            raise _no_column(where, missing, names)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        values: of the columns that it has; a column that it lacks is absent, which is not the same as None.
        place: where it stands, for messages: a line or a row, with its file where there are several.
        folder: of the table, from which its paths start; None for one that is not on this machine.
    """

    values: Mapping[str, Any]
    place: str
    folder: Path | None = None


class RowReader:
    """Turns rows into prompts, passes over rows without a text, and says once how many there were.

    Args:
        source: the table in words, for messages.
    """

    def __init__(self, source: str, columns: Columns) -> None:
        self._source = source
        self._columns = columns
        self._rows = 0
        self._empty = 0
        self._first_empty = ""
        self._has_reported = False
        self._not_seen = set(columns.all)
        self._names: dict[str, None] = {}

    def read(self, row: Row) -> Prompt | None:
        """The prompt of the next row; None where its text is missing or blank.

        Raises:
            PromptError: the first row has no caption, or a cell holds something else than text.
        """
        if not self._rows:
            self._columns = recognised(self._columns, row.values)
            self._not_seen = set(self._columns.all) - self._columns.optional
        columns = self._columns
        if not self._rows and columns.caption not in row.values:
            columns.check(in_words(self._source, row.place), row.values)
        self._watch_columns(row.values)
        text = self._text(row, columns.caption)
        if not text:
            self._empty += 1
            self._first_empty = self._first_empty or row.place
            return None
        stages = [self._text(row, name) for name in columns.stages]
        if not all(stages):
            name = columns.stages[stages.index("")]
            raise PromptError(f"{in_words(self._source, row.place)}: expected a text in column {name}, got none")
        negative = None if columns.negative_prompt is None else self._text(row, columns.negative_prompt)
        metadata = {name: row.values[name] for name in columns.metadata if name in row.values}
        for name, value in metadata.items():
            if is_nested_too_deep(value):
                raise PromptError(
                    f"{in_words(self._source, row.place)}: expected lists and mappings in at most {MAX_DEPTH} levels "
                    f"in column {name}, got more; write it flat"
                )
        return Prompt(text, negative, tuple(stages), metadata, self._image(row))

    def _image(self, row: Row) -> ConditionImage | None:
        """The picture of a row: a path, or what `datasets` keeps of one.

        Raises:
            PromptError: there is none, or no file under its path.
        """
        if self._columns.image is None:
            return None
        found = row.values.get(self._columns.image)
        if isinstance(found, ConditionImage):
            return found
        path, data = (found.get("path"), found.get("bytes")) if isinstance(found, Mapping) else (found, None)
        if isinstance(data, bytes):
            return ConditionImage(data=data)
        if isinstance(path, str) and path and row.folder is not None:
            file = row.folder / path
            if stays_inside(path) and file.is_file():
                return ConditionImage(str(file))
            got = f"{path}, where there is no file" if stays_inside(path) else f"{path}, which leaves that folder"
        else:
            got = "none" if not path else f"{path!r:.60}"
        raise PromptError(
            f"{in_words(self._source, row.place)}: expected a picture in column {self._columns.image}, got {got}; "
            "write paths from the table's folder on, or store the pictures in the data"
        )

    def report(self) -> None:
        """Once all rows are read: warns, the first time, of those that were passed over.

        Raises:
            PromptError: there was no prompt at all, or no row had one of the columns.
        """
        if self._empty == self._rows:
            rows = f"its {self._rows} rows have" if self._rows else "it has"
            raise PromptError(f"{in_words(self._source)}: {rows} no text in column {self._columns.caption}")
        if self._not_seen:
            raise _no_column(in_words(self._source), self._sorted_not_seen(), self._names)
        if self._empty and not self._has_reported:
            logger.warning(
                "%s: %d of %d rows have no text in column %s and are left out, the first is %s.",
                *(in_words(self._source), self._empty, self._rows, self._columns.caption, self._first_empty),
            )
        self._has_reported = True

    def _watch_columns(self, values: Mapping[str, Any]) -> None:
        self._rows += 1
        if self._rows <= MANY_ROWS:
            self._names.update(dict.fromkeys(values))
        if self._not_seen:
            self._not_seen -= values.keys()
        if self._not_seen and self._rows == MANY_ROWS:
            logger.warning(
                "%s: none of the first %d rows has a column %s; their columns are %s.",
                *(in_words(self._source), MANY_ROWS, ", ".join(self._sorted_not_seen()), ", ".join(self._names)),
            )

    def _sorted_not_seen(self) -> list[str]:
        return [name for name in self._columns.all if name in self._not_seen]

    def _text(self, row: Row, name: str) -> str:
        value = row.values.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise PromptError(
                f"{in_words(self._source, row.place)}: expected text in column {name}, got {type(value).__name__} "
                f"{value!r:.60}; its columns are {', '.join(row.values)}"
            )
        text = value.strip()
        problem = problem_of(text)
        if problem is not None:
            raise PromptError(f"{in_words(self._source, row.place)}: expected text in column {name}, got {problem}")
        return text


def problem_of(text: str) -> str | None:
    """What makes a text none that could be drawn, in words; None for a sound one, and for the empty one."""
    found = NEVER_TEXT.search(text)
    if found is not None:
        what = {
            "\x00": "a NUL, as in a file that is not UTF-8 but UTF-16",
            "\ufeff": "a byte order mark, as where files were joined",
        }.get(found.group(), "what is no character")
        return f"{what} (U+{ord(found.group()):04X} at character {found.start() + 1}); remove it, or save as UTF-8"
    if text and not any(map(_is_visible, text)):
        return f"invisible characters alone (U+{ord(text[0]):04X}); remove them"
    return None


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cn", "Mn", "Zl", "Zp", "Zs") and (
        character not in BLANK_LETTERS
    )


def _no_column(where: str, missing: Iterable[str], names: Iterable[str]) -> PromptError:
    return PromptError(
        f"{where}: no column {', '.join(missing)}; its columns are {', '.join(names) or 'none'}. "
        f"Name the right ones with {FLAGS}"
    )


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
    # HPDv2, train.json and test.json; its benchmark's files are lists of texts
    Benchmark(frozenset({"prompt", "human_preference"}), "prompt", ()),
    Benchmark(frozenset({"prompt", "raw_annotations"}), "prompt", ()),
)


def recognised(columns: Columns, names: Iterable[str]) -> Columns:
    """The columns to read of a table: those of a published benchmark, if that is what it is and none were named.

    Args:
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


def in_words(source: str, place: str = "") -> str:
    """Where a message is about: the source, and the line or row in it if there is one."""
    return f"prompts '{source}'" + (f", {place}" if place else "")
