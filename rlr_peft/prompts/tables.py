"""Prompts from files, datasets and the built-in sets, and which of them are held back for evaluation.

Tables are local files, or datasets of the Hub or of a local folder, whose files `datasets` finds. Prompts are held back
by their text, so that a repeated prompt is never on both sides.
"""

import contextlib
import glob
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rlr_peft import tiny_shapes
from rlr_peft.config.prompts import BUILTIN_SETS, TABLES, nearest_source
from rlr_peft.errors import UserError, extra
from rlr_peft.files import prompt_sets
from rlr_peft.prompt import ConditionImage, Prompt, PromptError, as_prompts
from rlr_peft.prompts.files import csv_rows, json_rows, parquet_rows, prompt_lines, without_nulls
from rlr_peft.prompts.rows import Columns, Row, RowReader, in_words, one_row_a_prompt

logger = logging.getLogger(__name__)

# From an open file and a prefix of places to rows.
Reader = Callable[..., Iterator[Row]]
# What a dataset's card may say of its .csv files besides their names.
CSV_OPTIONS = ("sep", "quotechar")
# The 45 common animals of DDPO's aesthetic experiment (arXiv:2305.13301), a prompt each.
ANIMALS = tuple(
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo".split()
)
HELD_BACK_ANIMALS = ("zebra", "raccoon", "beetle", "dolphin", "goose", "hedgehog")
"""Never trained on with ``simple-animals/train``: mammals, a bird and an insect."""
EXPECTED = f"expected one of {', '.join(BUILTIN_SETS)}, or a .txt, {', '.join(TABLES)} file"


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
        for row in reader(path.open("rb")):
            yield row._replace(folder=path.absolute().parent)


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
    datasets = extra("datasets", "datasets", "a dataset of prompts")  # takes two seconds
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
        ".tsv": lambda file, prefix="": csv_rows(file, source, columns, prefix, delimiter="\t", quotechar=None),
        ".json": lambda file, prefix="": json_rows(file, source, prefix),
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
            folder = Path(file).parent if os.path.isfile(file) else None
            for row in reader(xopen(path, "rb"), prefix):
                yield row._replace(folder=folder)


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
            if columns.image is not None and isinstance((table.features or {}).get(columns.image), datasets.Image):
                table = table.cast_column(columns.image, datasets.Image(decode=False))
    rows = iter(table)
    for number in itertools.count(1):
        with _explained(spec.name), _quiet_library(datasets):
            row = next(rows, None)
        if row is None:
            return
        values = without_nulls(row)
        picture = None if columns.image is None else values.get(columns.image)
        if isinstance(picture, dict) and not picture.get("bytes") and picture.get("path"):
            values[columns.image] = ConditionImage(picture["path"])  # where the library itself found it
        yield Row(values, f"row {number}")


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
        near = None if os.path.exists(os.path.expanduser(source)) else nearest_source(source)
        hint = "" if near is None else f"; did you mean {near}?"
        raise PromptError(f"{in_words(source)}: cannot be read: {words}{hint}") from error


@contextlib.contextmanager
def _quiet_library(datasets: Any) -> Iterator[None]:
    """What the library logs of an error is said again, and better, by the exception."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def builtin_texts(name: str) -> list[str] | None:
    """The texts of a built-in set in a fixed order; None for a name that is none, or that of a file."""
    if name == "tiny-shapes/train":
        return tiny_shapes.prompts("train")
    if name == "tiny-shapes/test":
        return tiny_shapes.prompts("test")
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
            f"use a {', '.join(TABLES)} file or drop the columns"
        )
    return as_prompts(texts[:max_samples])


def dataset_prompts(spec: DatasetSpec, columns: Columns, max_samples: int | None = None) -> Iterator[Prompt]:
    """The prompts of a dataset, row by row from the first.

    Args:
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
    prompts = (prompt for row in one_row_a_prompt(rows) if (prompt := reader.read(row)) is not None)
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
    if path.suffix.lower() not in (".txt", *TABLES):
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
