"""Prompts from files, datasets and the built-in sets, and which of them are held back for evaluation.

They are held back by their text, so that a repeated prompt is never on both sides.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlr_peft.config.chain import BUILTIN_SETS
from rlr_peft.prompt import Prompt, PromptError, as_prompts
from rlr_peft.prompts.files import Columns, Row, RowReader, prompt_lines
from rlr_peft.prompts.tables import FORMATS, DatasetSpec, dataset_rows, file_rows
from rlr_peft.recipes import prompt_sets
from rlr_peft.tiny_shapes import scenes

# The 45 common animals of DDPO's aesthetic experiment (arXiv:2305.13301), a prompt each.
ANIMALS = tuple(
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo".split()
)
HELD_BACK_ANIMALS = ("zebra", "raccoon", "beetle", "dolphin", "goose", "hedgehog")
"""Never trained on with ``simple-animals/train``: mammals, a bird and an insect."""


def builtin_texts(name: str) -> list[str] | None:
    """The texts of a built-in set in a fixed order; None for a name that is none, or that of a file."""
    if name == "tiny-shapes/train":
        return scenes.prompts("train")
    if name == "tiny-shapes/test":
        return scenes.prompts("test")
    if name == "simple-animals":
        return list(ANIMALS)
    if name == "simple-animals/train":
        return [animal for animal in ANIMALS if animal not in HELD_BACK_ANIMALS]
    return list(HELD_BACK_ANIMALS) if name == "simple-animals/test" else None


def hold_back(prompts: Sequence[Prompt], percentage: float) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-back prompts, each in their order.

    The choice depends on the texts and the percentage alone, not on the seed: runs with other seeds are compared on the
    same unseen prompts.

    Args:
        prompts: all prompts.
        percentage: of the different texts, above 0 and below 100; at least one is held back and one is left.

    Raises:
        PromptError: fewer than two different prompts.
    """
    texts = sorted({prompt.text for prompt in prompts}, key=_rank)
    if len(texts) < 2:
        raise PromptError(
            "expected at least 2 different prompts to hold some back, got 1; drop validation_split_percentage"
        )
    count = min(max(1, round(len(texts) * percentage / 100)), len(texts) - 1)
    held = set(texts[:count])
    return [prompt for prompt in prompts if prompt.text not in held], [
        prompt for prompt in prompts if prompt.text in held
    ]


def is_held_back(prompt: Prompt, percentage: float) -> bool:
    """The same for a prompt alone, of a stream whose number of texts is not known: the share holds on average."""
    return int.from_bytes(_rank(prompt.text)[:8], "big") < percentage / 100 * 2**64


def _rank(text: str) -> bytes:
    return hashlib.sha256(f"held back/{text}".encode()).digest()


EXPECTED = f"expected one of {', '.join(BUILTIN_SETS)}, or a .txt, {', '.join(FORMATS)} file"


def load_prompts(spec: str, max_samples: int | None = None, columns: Columns | None = None) -> list[Prompt]:
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
    texts = builtin_texts(spec)
    if texts is None:
        path = prompt_sets().get(spec) or _existing_file(spec)
        if path.suffix.lower() != ".txt":
            return list(_read(RowReader(spec, columns), file_rows(path, columns), max_samples))
        texts = _read_text_file(path, spec)
    if columns.beyond_caption:
        raise PromptError(
            f"prompts '{spec}': expected a table with columns {', '.join(columns.beyond_caption)}, got plain lines; "
            f"use a {', '.join(FORMATS)} file or drop the columns"
        )
    return as_prompts(texts[:max_samples])


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


def prompts_of_rows(
    rows: Sequence[Prompt | str | Mapping[str, Any]], columns: Columns, max_samples: int | None = None
) -> list[Prompt]:
    """The prompts of a list of texts, or of dictionaries as the rows of a table.

    Args:
        rows: a text stands for a row of the caption alone; prompts are taken as they are, where all are such.
        columns: what to read of the rows.
        max_samples: only this many prompts; None for all.

    Raises:
        PromptError: a missing column, a cell that is no text, or no prompt at all.
    """
    prompts = [row for row in rows if isinstance(row, Prompt)]
    if rows and len(prompts) == len(rows):
        return prompts[:max_samples]
    values = (row if isinstance(row, Mapping) else {columns.caption: str(row)} for row in rows)
    table = (Row(row, f"prompt {number}") for number, row in enumerate(values, 1))
    return list(_read(RowReader("the list", columns), table, max_samples))


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
