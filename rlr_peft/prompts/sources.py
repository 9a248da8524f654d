"""Prompts from files, datasets and the built-in sets."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from rlr_peft.config.chain import BUILTIN_SETS
from rlr_peft.prompt import Prompt
from rlr_peft.prompts.builtin import builtin_prompts
from rlr_peft.prompts.errors import PromptError
from rlr_peft.prompts.files import prompt_lines
from rlr_peft.prompts.rows import Columns, Row, RowReader
from rlr_peft.prompts.tables import FORMATS, DatasetSpec, dataset_rows, file_rows

EXPECTED = f"expected one of {', '.join(BUILTIN_SETS)}, or a .txt, {', '.join(FORMATS)} file"


def load_prompts(spec: str, max_samples: int | None = None, columns: Columns | None = None) -> list[str]:
    """Read prompts.

    Args:
        spec: the name of a built-in set; a UTF-8 `.txt` file with one prompt a line; or a `.jsonl`, `.csv` or
            `.parquet` file with a column of prompts. Blank lines are skipped (blank cells are counted and reported),
            surrounding white space is dropped, and repeated prompts stay (they weigh more).
        max_samples: keep only this many, from the front; None keeps all.
        columns: what to read of a table; by default its column `text`.

    Returns:
        At least one prompt, in the order of the source.

    Raises:
        PromptError: no such source, unreadable, a missing column, a text that is none, or without a prompt.
    """
    if max_samples is not None and max_samples < 1:
        raise PromptError(f"expected at least 1 prompt to keep, got max_samples = {max_samples}")
    columns = Columns() if columns is None else columns
    prompts = builtin_prompts(spec)
    if prompts is None:
        path = _existing_file(spec)
        if path.suffix.lower() != ".txt":
            return list(_read(RowReader(spec, columns), file_rows(path, columns), max_samples))
        prompts = _read_text_file(path, spec)
    if columns.beyond_caption:
        raise PromptError(
            f"prompts '{spec}': expected a table with columns {', '.join(columns.beyond_caption)}, got plain lines; "
            f"use a {', '.join(FORMATS)} file or drop the columns"
        )
    return list(prompts[:max_samples])


def dataset_prompts(spec: DatasetSpec, columns: Columns, max_samples: int | None = None) -> Iterator[Prompt]:
    """The prompts of a dataset, row by row from the first.

    Args:
        spec: which dataset.
        columns: what to read of it.
        max_samples: only this many prompts; None for all.

    Raises:
        PromptError: no such dataset, a missing column, a cell that is no text, or no prompt at all.
    """
    return _read(RowReader(spec.name, columns), dataset_rows(spec, columns), max_samples)


def _read(reader: RowReader, rows: Iterator[Row], max_samples: int | None) -> Iterator[Prompt]:
    prompts = (prompt for row in rows if (prompt := reader.read(row)) is not None)
    yield from itertools.islice(prompts, max_samples)
    reader.report()


def _existing_file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.is_dir():
        raise PromptError(
            f"prompts '{spec}': {EXPECTED}, got a folder; give the path of the file in it, or read it as a dataset "
            "with --dataset_name"
        )
    if not path.exists():
        raise PromptError(f"prompts '{spec}': {EXPECTED}; no such file (looked for it from {Path.cwd()})")
    if path.suffix.lower() not in (".txt", *FORMATS):
        raise PromptError(f"prompts '{spec}': {EXPECTED}, got a file ending in '{path.suffix}'")
    return path


def _read_text_file(path: Path, spec: str) -> list[str]:
    try:
        prompts = [prompt for prompt, _ in prompt_lines(path.open("rb"), spec)]
    except OSError as error:
        raise PromptError(f"prompts '{spec}': cannot be read: {error.strerror}") from error
    if not prompts:
        raise PromptError(f"prompts '{spec}': the file holds no prompt; write one a line")
    return prompts
