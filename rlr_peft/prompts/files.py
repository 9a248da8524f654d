"""Rows of open .txt, .csv, .jsonl and .parquet files as they are written, each with its place, and prompts from them.

Libraries for tables guess: types, missing values, an index, the columns of a whole file from its first part. A prompt
file says what it says: cells of a .csv are text, keys of a JSON object are those of its line.
"""

import csv
import io
import itertools
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from rlr_peft.durable_files import stays_inside
from rlr_peft.extras import extra
from rlr_peft.plain_files import MAX_DEPTH, is_nested_too_deep
from rlr_peft.prompt import ConditionImage, Prompt, PromptError
from rlr_peft.prompts.benchmarks import recognised

logger = logging.getLogger(__name__)

FLAGS = "--caption_column, --negative_prompt_column, --image_column, --metadata_columns and --dcot_columns"
# Rows by key may bring a column late, but one that this many rows lack is more likely misspelt.
MANY_ROWS = 1000
# What no text holds: signs of another encoding, of files glued together, or of damage.
NEVER_TEXT = re.compile("[\x00\ufeff\ufffe\uffff\ud800-\udfff]")
# Letters and symbols by their category, which draw nothing all the same: Hangul fillers and the empty Braille cell.
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"


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
        columns: what to read.
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


# Characters of one cell: more than any text has, less than memory. A quote that is never closed reaches to the end.
MAX_CELL = 2**26
# How bytes that are no UTF-8 come out of `surrogateescape`; text that is UTF-8 holds none of these.
BAD_BYTE = re.compile("[\udc80-\udcff]")
BATCH_ROWS = 1000


def text_lines(file: BinaryIO, source: str, prefix: str = "") -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, whichever of the three kinds these are.

    Args:
        file: read to its end, and closed.
        source: in words, for messages.
        prefix: of places in messages, such as the name of a file of several.

    Raises:
        PromptError: bytes that are no UTF-8, or a NUL, with their line.
    """
    # Windows editors put a byte order mark in front, which must not become part of the first prompt.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        for number, line in enumerate(text, start=1):
            bad = None if line.isascii() else BAD_BYTE.search(line)
            if bad is not None:
                raise PromptError(
                    f"{in_words(source, f'{prefix}line {number}')}: expected UTF-8, got byte "
                    f"0x{ord(bad.group()) - 0xDC00:02x} at character {bad.start() + 1}; save the file as UTF-8"
                )
            if "\x00" in line:
                place = f"{prefix}line {number}"
                raise PromptError(f"{in_words(source, place)}: expected text, got {problem_of(line)}")
            yield line


def prompt_lines(file: BinaryIO, source: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, without surrounding white space, and their places.

    Raises:
        PromptError: a line that is no text, with its number.
    """
    for number, line in enumerate(text_lines(file, source, prefix), start=1):
        text, place = line.strip(), f"{prefix}line {number}"
        problem = problem_of(text)
        if problem is not None:
            raise PromptError(f"{in_words(source, place)}: expected a prompt, got {problem}")
        if text:
            yield text, place


def csv_rows(
    file: BinaryIO,
    source: str,
    columns: Columns,
    prefix: str = "",
    delimiter: str = ",",
    quotechar: str | None = '"',
) -> Iterator[Row]:
    """The rows below the header, every cell as the text that is written; blank lines are none.

    Raises:
        PromptError: no header, a column is missing in it or there twice, or a row with more or fewer cells than it has.
    """
    csv.field_size_limit(MAX_CELL)
    lines = text_lines(file, source, prefix)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if quotechar is None else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=delimiter, quotechar=quotechar, quoting=quoting, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{prefix}line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise PromptError(f"{in_words(source, place)}: cannot be read as CSV from here: {error}") from None
        if not cells:
            continue
        if header is None:
            header = cells
            _check_header(in_words(source, place), columns, header)
        elif len(cells) != len(header):
            raise PromptError(
                f"{in_words(source, place)}: expected as many cells as the header has ({len(header)}: "
                f"{', '.join(header)}), got {len(cells)}: {' | '.join(cells)!r:.100}; put a text that holds commas in "
                "quotes"
            )
        else:
            yield Row(dict(zip(header, cells)), place)
    if header is None:
        raise PromptError(f"{in_words(source)}: it holds no row" + (f" ({prefix.rstrip(', ')})" if prefix else ""))


def json_rows(file: BinaryIO, source: str, prefix: str = "", field: str | None = None) -> Iterator[Row]:
    """The objects of JSON Lines, or of one JSON list, each with the keys that it has.

    Args:
        file, source, prefix: as for `text_lines`.
        field: the list is the value of this key of a single object.

    Raises:
        PromptError: a line that is no JSON object, or has a key twice.
    """
    lines = text_lines(file, source, prefix)
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise PromptError(f"{in_words(source)}: it holds no row" + (f" ({prefix.rstrip(', ')})" if prefix else ""))
    if field is not None or first[1].lstrip().startswith("["):
        # Blank lines too, for the line that a message names.
        whole = _parse("\n" * (first[0] - 1) + first[1] + "".join(lines), in_words(source, prefix.rstrip(", ")))
        entries = whole.get(field) if isinstance(whole, dict) else whole
        if not isinstance(entries, list):
            raise PromptError(f"{in_words(source)}: expected a list of rows, got {type(entries).__name__}")
        found = ((f"{prefix}entry {number}", entry) for number, entry in enumerate(entries, start=1))
    else:
        places = ((f"{prefix}line {number}", line) for number, line in itertools.chain([first], numbered))
        found = ((place, _parse(line, in_words(source, place))) for place, line in places)
    for place, values in found:
        if isinstance(values, str):  # a list of texts, as HPDv2 has them
            values = {"text": values}
        if not isinstance(values, dict):
            raise PromptError(
                f'{in_words(source, place)}: expected a JSON object such as {{"text": "a cat"}}, got '
                f"{type(values).__name__}"
            )
        yield Row(values, place)


def parquet_rows(file: BinaryIO, source: str, columns: Columns, prefix: str = "") -> Iterator[Row]:
    """The rows of the wanted columns. A null stands for a value or key that is not there: the format has no other way.

    Raises:
        PromptError: a column is missing.
        OSError, ValueError: pyarrow cannot read the file.
    """
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        columns = recognised(columns, names)
        columns.check(in_words(source, prefix.rstrip(", ")), names)
        there = [name for name in columns.all if name in names]
        decode = _decoder(table.schema_arrow, there, columns.image)
        for batch in table.iter_batches(BATCH_ROWS, columns=there):
            for values in batch.to_pylist():
                number += 1
                yield Row(without_nulls(decode(values)), f"{prefix}row {number}")


def without_nulls(value: Any) -> Any:
    """The value with the keys of null left out, at every depth; nulls of a list stay at their places."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _check_header(where: str, columns: Columns, header: list[str]) -> None:
    columns = recognised(columns, header)
    columns.check(where, header)
    twice = [name for name in columns.all if header.count(name) > 1]
    if twice:
        raise PromptError(f"{where}: expected every column once, got {', '.join(twice)} twice; rename one of them")


def _decoder(schema: Any, names: list[str], image: str | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns stored cells into those that were meant: `datasets` stores some, such as mixed JSON, in disguise."""
    if b"huggingface" not in (schema.metadata or {}):
        return lambda values: values
    datasets = extra("datasets", "datasets", "a .parquet file that `datasets` wrote")  # takes two seconds

    stored = datasets.Features.from_arrow_schema(schema)
    wanted = {name: stored[name] for name in names}
    if image is not None and isinstance(wanted[image], datasets.Image):
        wanted[image] = datasets.Image(decode=False)
    return datasets.Features(wanted).decode_example


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}" if "\n" in text.rstrip() else f"character {error.colno}"
        raise PromptError(f"{where}: cannot be read as JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: cannot be read as JSON: {error}") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} is there twice")
    return values


def in_words(source: str, place: str = "") -> str:
    """Where a message is about: the source, and the line or row in it if there is one."""
    return f"prompts '{source}'" + (f", {place}" if place else "")
