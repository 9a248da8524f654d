"""Rows of open .txt, .csv, .jsonl and .parquet files as they are written, each with its place.

Libraries for tables guess: types, missing values, an index, the columns of a whole file from its first part. A prompt
file says what it says: cells of a .csv are text, keys of a JSON object are those of its line.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal

from rlr_peft.errors import extra
from rlr_peft.prompt import PromptError
from rlr_peft.prompts.rows import Columns, Row, in_words, problem_of, recognised

# Characters of one cell: more than any text has, less than memory. A quote that is never closed reaches to the end.
MAX_CELL = 2**26
# How bytes that are no UTF-8 come out of `surrogateescape`; text that is UTF-8 holds none of these.
BAD_BYTE = re.compile("[\udc80-\udcff]")
BATCH_ROWS = 1000


def text_lines(file: BinaryIO, source: str, prefix: str = "") -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, whichever of the three kinds these are.

    Args:
        file: read to its end, and closed.
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
