"""Tables of prompts: local files, and datasets of the Hub or of a local folder, whose files `datasets` finds."""

import contextlib
import glob
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rlr_peft.errors import UserError
from rlr_peft.extras import extra
from rlr_peft.prompt import PromptError
from rlr_peft.prompts.files import (
    Columns,
    Row,
    csv_rows,
    in_words,
    json_rows,
    parquet_rows,
    prompt_lines,
    without_nulls,
)

logger = logging.getLogger(__name__)

FORMATS = (".jsonl", ".csv", ".parquet")
"""Endings of tables."""

# From an open file and a prefix of places to rows.
Reader = Callable[..., Iterator[Row]]
# What a dataset's card may say of its .csv files besides their names.
CSV_OPTIONS = ("sep", "quotechar")


@dataclass(frozen=True)
class DatasetSpec:
    """Which dataset to read.

    Attributes:
        name: Hub id or local folder.
        config_name: of datasets that have several configurations.
        split: of the dataset.
        streaming: read rows as they come instead of fetching all files of the split first.
    """

    name: str
    config_name: str | None = None
    split: str = "train"
    streaming: bool = False


def file_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a .jsonl, .csv or .parquet file.

    Raises:
        PromptError: the file is empty or damaged.
    """
    reader = _readers(str(path), columns)[path.suffix.lower()]
    with _explained(str(path)):
        yield from reader(path.open("rb"))


def dataset_rows(spec: DatasetSpec, columns: Columns) -> Iterator[Row]:
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
    datasets = extra("datasets", "datasets", "--dataset_name")  # takes two seconds
    with _explained(spec.name), _quiet_library(datasets):
        builder = _builder(datasets, spec)
        files = _files(builder, spec, columns)
    if files is None:
        yield from _library_rows(datasets, builder, spec, columns)
        return
    with _explained(spec.name):
        if spec.split in files:
            yield from _rows_of_files(datasets, files[spec.split], spec)
            return
        for part in _slices(datasets, files, spec):
            yield from itertools.islice(_rows_of_files(datasets, files[part.splitname], spec), part.from_, part.to)


def _readers(source: str, columns: Columns) -> dict[str, Reader]:
    """How the rows of an open file are read, by its ending."""

    def text_rows(file: BinaryIO, prefix: str = "") -> Iterator[Row]:
        columns.check(in_words(source), ["text"])
        for line, place in prompt_lines(file, source, prefix):
            yield Row({"text": line}, place)

    return {
        ".csv": lambda file, prefix="", **options: csv_rows(file, source, columns, prefix, **options),
        ".jsonl": lambda file, prefix="", **options: json_rows(file, source, prefix, **options),
        ".parquet": lambda file, prefix="": parquet_rows(file, source, columns, prefix),
        ".txt": text_rows,
    }


def _builder(datasets: Any, spec: DatasetSpec) -> Any:
    """What `datasets` makes of a dataset's card and the names of its files."""
    import huggingface_hub

    name = spec.name
    if huggingface_hub.constants.HF_HUB_OFFLINE and not os.path.isdir(name):
        revisions: list[Any] = []
        # `datasets` asks the Hub for the names of files, although the files may be here.
        with contextlib.suppress(huggingface_hub.errors.CacheNotFound):
            cached = [repo for repo in huggingface_hub.scan_cache_dir().repos if repo.repo_type == "dataset"]
            revisions = [revision for repo in cached if repo.repo_id == name for revision in repo.revisions]
        if revisions:
            name = str(max(revisions, key=lambda revision: revision.last_modified).snapshot_path)
            logger.warning("Offline: %s is read as far as its files are in the cache, at %s.", spec.name, name)
    return datasets.load_dataset_builder(name, spec.config_name)


def _files(builder: Any, spec: DatasetSpec, columns: Columns) -> dict[str, list[tuple[str, Reader]]] | None:
    """The files of every split and how they are read; None for a kind of dataset that is left to the library."""
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.text.text import Text

    readers, config = _readers(spec.name, columns), builder.config
    splits = {str(split): [str(file) for file in files] for split, files in (config.data_files or {}).items()}
    reader: Reader
    if isinstance(builder, Csv):
        _check_csv_options(config, spec)
        reader = partial(readers[".csv"], delimiter=config.sep, quotechar=config.quotechar)
    elif isinstance(builder, Json):
        reader = partial(readers[".jsonl"], field=config.field)
    elif isinstance(builder, Parquet):
        reader = readers[".parquet"]
    elif isinstance(builder, Text) and config.sample_by == "line":
        reader = readers[".txt"]
    elif isinstance(builder, FolderBasedBuilder):
        # Of a folder of images, only the table beside them.
        names = config.metadata_filenames or builder.METADATA_FILENAMES
        tables = {
            split: [(file, readers[Path(file).suffix]) for file in files if os.path.basename(file) in names]
            for split, files in splits.items()
        }
        return tables if tables and all(tables.values()) else None
    else:
        return None
    return {split: [(file, reader) for file in files] for split, files in splits.items()}


def _check_csv_options(config: Any, spec: DatasetSpec) -> None:
    """The other options make pandas guess, skip or rename: nothing that a reader of rows as they are can do."""
    plain = type(config)()
    changed = [name for name in plain.pd_read_csv_kwargs if getattr(config, name) != getattr(plain, name)]
    other = [name for name in changed if name not in CSV_OPTIONS]
    if other:
        raise PromptError(
            f"{in_words(spec.name)}: expected a card that says no more of its .csv files than "
            f"{' and '.join(CSV_OPTIONS)}, got {', '.join(other)}; give the file itself with --prompt_path"
        )


def _rows_of_files(datasets: Any, files: list[tuple[str, Reader]], spec: DatasetSpec) -> Iterator[Row]:
    from datasets.utils.file_utils import xopen

    manager = datasets.StreamingDownloadManager() if spec.streaming else datasets.DownloadManager()
    for file, reader in files:
        prefix = f"{os.path.basename(file)}, "
        for path in manager.iter_files([manager.download_and_extract(file)]):
            yield from reader(xopen(path, "rb"), prefix)


def _slices(datasets: Any, files: dict[str, list[tuple[str, Reader]]], spec: DatasetSpec) -> list[Any]:
    """The parts of a split such as `train[:10%]` or `train+test`.

    Raises:
        ValueError: there is no such split.
    """
    if spec.streaming or not any(sign in spec.split for sign in "[+"):
        raise ValueError(f'Unknown split "{spec.split}". Should be one of {list(files)}.')
    lengths = {
        name: sum(1 for _ in _rows_of_files(datasets, files[name], spec)) if name in spec.split else 0 for name in files
    }
    return list(datasets.ReadInstruction.from_spec(spec.split).to_absolute(lengths))


def _library_rows(datasets: Any, builder: Any, spec: DatasetSpec, columns: Columns) -> Iterator[Row]:
    """The rows of any other kind of dataset, as the library reads them."""
    with _explained(spec.name), _quiet_library(datasets):
        if spec.streaming:
            table = builder.as_streaming_dataset(spec.split)
        else:
            builder.download_and_prepare()
            table = builder.as_dataset(spec.split)
        names = table.column_names
        if names is not None:
            columns.check(in_words(spec.name), names)
            # Other columns may hold images, whose decoding would cost more than all the rest.
            table = table.select_columns(list(columns.all))
    rows = iter(table)
    for number in itertools.count(1):
        with _explained(spec.name), _quiet_library(datasets):
            row = next(rows, None)
        if row is None:
            return
        yield Row(without_nulls(row), f"row {number}")


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Errors of the libraries in one line that names the source and the first cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        words = " ".join(str(cause).split()) or type(cause).__name__
        raise PromptError(f"{in_words(source)}: cannot be read: {words}") from error


@contextlib.contextmanager
def _quiet_library(datasets: Any) -> Iterator[None]:
    """What the library logs of an error is said again, and better, by the exception."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
