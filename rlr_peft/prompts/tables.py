"""Tables of prompts through the ``datasets`` library: local files, and datasets of the Hub or of a local folder."""

import contextlib
import glob
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlr_peft.prompts.errors import PromptError
from rlr_peft.prompts.rows import Columns

FORMATS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""Builder of the ``datasets`` library by ending."""


@dataclass(frozen=True)
class DatasetSpec:
    """Which dataset to read.

    Attributes:
        name: Hub id or local folder.
        config_name: of datasets that have several configurations.
        split: of the dataset.
        streaming: read rows as they come instead of preparing the whole dataset first.
    """

    name: str
    config_name: str | None = None
    split: str = "train"
    streaming: bool = False


def file_rows(path: Path, columns: Columns) -> Iterator[Mapping[str, Any]]:
    """The rows of a .jsonl, .csv or .parquet file, read anew: nothing is kept in a cache that could be outdated.

    Raises:
        PromptError: the file is empty or damaged.
    """
    spec = DatasetSpec(str(path), streaming=True)
    # The library takes paths for patterns: `prompts[1].csv` would stand for `prompts1.csv`.
    pattern = glob.escape(str(path.absolute()))
    yield from _rows(spec, columns, path=FORMATS[path.suffix.lower()], data_files=pattern)


def dataset_rows(spec: DatasetSpec, columns: Columns) -> Iterator[Mapping[str, Any]]:
    """The rows of a dataset.

    Raises:
        PromptError: no such dataset, configuration, split or column, damaged files, or a folder named like a pattern.
    """
    folder = Path(spec.name).absolute()
    if folder.is_dir() and glob.has_magic(str(folder)):
        raise PromptError(
            f"prompts '{spec.name}': expected a folder without *, ? and [ in its path, which are read as a pattern of "
            f"other folders, got {folder}; rename it, or give the file in it with --prompt_path"
        )
    yield from _rows(spec, columns, path=spec.name, name=spec.config_name)


def _rows(spec: DatasetSpec, columns: Columns, **where: Any) -> Iterator[Mapping[str, Any]]:
    import datasets  # takes two seconds that prompts from a .txt need not wait for

    with _explained(spec.name, datasets.exceptions.DatasetsError), _quiet_library(datasets):
        table = datasets.load_dataset(split=spec.split, streaming=spec.streaming, **where)
        names = table.column_names
        # Other columns may hold images, whose decoding would cost more than all the rest. Where a column is missing
        # all stay, so that the reader can name them.
        if names is not None and set(columns.all) <= set(names):
            table = table.select_columns(list(columns.all))
    rows = iter(table)
    while True:
        with _explained(spec.name, datasets.exceptions.DatasetsError), _quiet_library(datasets):
            row = next(rows, None)
        if row is None:
            return
        yield row


@contextlib.contextmanager
def _explained(source: str, datasets_error: type[Exception]) -> Iterator[None]:
    """Errors of the library in one line that names the source and the first cause."""
    try:
        yield
    except StopIteration:  # what the library raises for an empty file
        raise PromptError(f"prompts '{source}': it holds no row") from None
    except (datasets_error, OSError, ValueError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise PromptError(f"prompts '{source}': cannot be read: {' '.join(str(cause).split())}") from error


@contextlib.contextmanager
def _quiet_library(datasets: Any) -> Iterator[None]:
    """What the library logs of an error is said again, and better, by the exception."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
