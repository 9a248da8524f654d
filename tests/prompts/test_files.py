"""Every cell, key and line of a prompt file arrives as it is written, or stops with its place."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlr_peft.prompt import Prompt, PromptError, texts_of
from rlr_peft.prompts import MANY_ROWS, Columns, DatasetSpec, dataset_prompts, load_prompts

GENEVAL = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"}
{"tag": "counting", "include": [{"class": "clock"}], "exclude": [{"class": "clock", "count": 3}], "prompt": "clocks"}
"""
OBJECTS = [json.loads(line) for line in GENEVAL.splitlines()]
GENEVAL_COLUMNS = Columns("prompt", metadata=("tag", "include", "exclude"))
GENEVAL_METADATA = [{key: value for key, value in row.items() if key != "prompt"} for row in OBJECTS]


def read_everywhere(
    folder: Path, name: str, content: bytes, columns: Columns
) -> list[list[tuple[str, dict[str, Any]]]]:
    """Prompts and metadata of a file alone, and as a dataset's file, whole and streamed."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    ways: list[list[Prompt]] = [load_prompts(str(folder / name), columns=columns)]
    ways += [list(dataset_prompts(DatasetSpec(str(folder), streaming=s), columns)) for s in (False, True)]
    return [[(prompt.text, dict(prompt.metadata)) for prompt in prompts] for prompts in ways]


REFUSED = {
    "commas": ("p.csv", b"text\na cat, sitting on a mat\na dog, here\n", "line 2: expected as many cells"),
    "commas, two columns": ("p.csv", b"text,n\na cat, on a mat,1\n", r"line 2: .*\(2: text, n\), got 3: 'a cat \| "),
    "commas in some rows": ("p.csv", b"text\na dog\na cat, on a mat\n", "line 3: expected as many cells"),
    "below a cell of two lines": ("p.csv", b'text,n\n"a\ncat",1\na dog, here,2\n', "line 4: expected as many cells"),
    "a cell too few": ("p.csv", b"text,n\na cat\n", "line 2: expected as many cells"),
    "an open quote": ("p.csv", b'text,n\na cat,1\n"a dog,2\nb,3\n', "line 3: cannot be read as CSV from here"),
    "text behind a quote": ("p.csv", b'text\n"a" cat\n', "line 2: cannot be read as CSV from here"),
    "a column twice": ("p.csv", b"text,text\na,b\n", "line 1: expected every column once, got text twice"),
    "a key twice": ("p.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2: .*key 'text' is there twice"),
    "no object": ("p.jsonl", b'{"text": "a"}\n\n["b"]\n', "line 3: expected a JSON object"),
    "half a pair": ("p.jsonl", b'{"text": "a \\ud83d"}\n', r"line 1: .*what is no character \(U\+D83D at"),
    "a NUL in JSON": ("p.jsonl", b'{"text": "a\\u0000b"}\n', r"line 1: .*a NUL.*\(U\+0000 at character 2\)"),
    "deep JSON": ("p.jsonl", b'{"text": "a", "deep": ' + b"[" * 200000 + b"]" * 200000 + b"}\n", "line 1: .*recursion"),
    "a long number": ("p.jsonl", b'{"text": "a", "n": ' + b"9" * 6000 + b"}\n", "line 1: cannot be read as JSON"),
    "NULs": ("p.csv", b"text\na cat\x00\n", r"line 2: expected text, got a NUL"),
    "UTF-16": ("p.csv", "text\na cat\n".encode("utf-16-le"), "line 1: expected text, got a NUL, as in .* UTF-16"),
    "UTF-16 with its mark": ("p.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1: expected UTF-8, got byte 0xff"),
    "Latin-1": ("p.csv", "text\na cat\ngr\u00fcn\n".encode("latin-1"), "line 3: expected UTF-8, got byte 0xfc at"),
    "a mark inside": ("p.csv", b"text\na cat\n\xef\xbb\xbfa dog\n", r"line 3: .*a byte order mark.*\(U\+FEFF at"),
    "invisible alone": ("p.csv", "text\n\u200b\u2060\n".encode(), r"line 2: .*invisible characters alone \(U\+200B\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_damaged_stops_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    for prefix, read in (
        ("p[^ ]*', ", lambda: load_prompts(str(tmp_path / name))),
        (f"', {name}, ", lambda: list(dataset_prompts(DatasetSpec(str(tmp_path)), Columns()))),
        (f"', {name}, ", lambda: list(dataset_prompts(DatasetSpec(str(tmp_path), streaming=True), Columns()))),
    ):
        with pytest.raises(PromptError, match=prefix + message) as caught:
            read()
        assert "\n" not in str(caught.value)


TEXT_REFUSED = {
    "nul.txt": (b"a dog\na cat\x00\n", "line 2: expected text, got a NUL"),
    "utf16.txt": ("a cat\na dog\n".encode("utf-16-le"), "line 1: expected text, got a NUL, as in .* UTF-16"),
    "mark.txt": (b"\xef\xbb\xbfa cat\n\xef\xbb\xbfa dog\n", "line 2: expected a prompt, got a byte order mark"),
    "unseen.txt": ("a cat\n\u200b\n".encode(), "line 2: expected a prompt, got invisible characters alone"),
    "filler.txt": ("a cat\n\u3164\u3164\n".encode(), "line 2: expected a prompt, got invisible characters alone"),
}


@pytest.mark.parametrize("name", TEXT_REFUSED)
def test_lines_that_are_no_text_are_refused(tmp_path: Path, name: str) -> None:
    content, message = TEXT_REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=f"{name}', {message}"):
        load_prompts(str(tmp_path / name))
    with pytest.raises(PromptError, match=f", {name}, {message}"):
        list(dataset_prompts(DatasetSpec(str(tmp_path)), Columns()))


def test_texts_that_look_odd_are_what_they_are(tmp_path: Path) -> None:
    texts = ["👨‍👩‍👧 family", "a\u200bb", "naïve", "日本", "👍🏽", "...", "\u0c1c\u0c4d\u0c1e\u200c\u0c3e"]
    (tmp_path / "p.txt").write_text("\r".join(texts), encoding="utf-8")  # line ends as of an old Mac
    assert texts_of(load_prompts(str(tmp_path / "p.txt"))) == texts
    assert texts_of(dataset_prompts(DatasetSpec(str(tmp_path)), Columns())) == texts


def test_cells_of_a_csv_are_the_text_that_is_written(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbftext,answer,\r\nNone,01,\r\n\r\nnull, 1.0,\r\n"a ""cat"", here",NA,x\r\n1984,"line\r\nline",\r\n'
    )
    for read in read_everywhere(tmp_path / "data", "train.csv", content, Columns(metadata=("answer",))):
        assert read == [
            ("None", {"answer": "01"}),
            ("null", {"answer": " 1.0"}),
            ('a "cat", here', {"answer": "NA"}),
            ("1984", {"answer": "line\r\nline"}),
        ]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_keys_of_a_json_line_are_its_own(tmp_path: Path, name: str) -> None:
    """The first ten megabytes do not decide what the other rows may have; what nobody asked for does not matter."""
    late = {
        "text": "late",
        "tag": None,
        "exclude": ["z"],
        "note": {"b": 2},
        "include": [{"class": "a", "color": "red"}],
    }
    early = json.dumps({"text": "p", "tag": "a", "note": "x" * 11_000_000, "include": [{"class": "a"}]})
    content = f"{early}\n{json.dumps(late)}\n".encode()
    if name.endswith(".json"):
        content = f"[{early}, {json.dumps(late)}]".encode()
    else:
        (tmp_path / name).write_bytes(content)
        assert len(load_prompts(str(tmp_path / name))) == 2
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    for streaming in (False, True):
        columns = Columns(metadata=("tag", "exclude", "include"))
        prompts = list(dataset_prompts(DatasetSpec(str(tmp_path / "data"), streaming=streaming), columns))
        assert [prompt.metadata for prompt in prompts] == [
            {"tag": "a", "include": [{"class": "a"}]},
            {"tag": None, "exclude": ["z"], "include": [{"class": "a", "color": "red"}]},
        ]


def test_absent_keys_stay_absent(tmp_path: Path) -> None:
    for read in read_everywhere(tmp_path / "json", "train.jsonl", GENEVAL.encode(), GENEVAL_COLUMNS):
        assert [metadata for _, metadata in read] == GENEVAL_METADATA
    # Parquet has no absent keys, and stores null in their place.
    stored = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"exclude": None, **row} for row in OBJECTS]), stored)
    for read in read_everywhere(tmp_path / "parquet", "train.parquet", stored.getvalue().to_pybytes(), GENEVAL_COLUMNS):
        assert [metadata for _, metadata in read] == GENEVAL_METADATA


def test_what_datasets_stores_in_disguise_is_restored(tmp_path: Path) -> None:
    rows = [{"text": "a", "facts": {"n": 1}}, {"text": "b", "facts": [1, "two"]}]
    features = datasets.Features({"text": datasets.Value("string"), "facts": datasets.Json()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    for read in read_everywhere(tmp_path / "data", "train.parquet", content, Columns(metadata=("facts",))):
        assert read == [("a", {"facts": {"n": 1}}), ("b", {"facts": [1, "two"]})]


def test_a_column_that_no_row_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a", "tags": 1}\n' * MANY_ROWS + '{"text": "b", "late": 2}\n')
    with pytest.raises(PromptError, match="no column tag; its columns are text, tags"):
        load_prompts(str(tmp_path / "p.jsonl"), columns=Columns(metadata=("tag",)))
    with pytest.raises(PromptError, match="no column late; its columns are text, tags"):
        load_prompts(str(tmp_path / "p.jsonl"), 5, Columns(metadata=("late",)))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load_prompts(str(tmp_path / "p.jsonl"), columns=Columns(metadata=("late",)))[-1].metadata == {"late": 2}
    assert f"none of the first {MANY_ROWS} rows has a column late; their columns are text, tags." in caplog.text


def test_files_of_datasets_of_other_forms(tmp_path: Path) -> None:
    """Several files of different columns, another separator, compressed files, a card's own field."""
    folders = {name: tmp_path / name for name in ("shards", "tabs", "gz", "field", "lines")}
    for folder in folders.values():
        folder.mkdir()
    (folders["shards"] / "train-0.csv").write_text("text,a\nx,1\n")
    (folders["shards"] / "train-1.csv").write_text("b,text\n2,y\n")
    (folders["tabs"] / "train.tsv").write_text("n\ttext\n1\tx, with a comma\n")
    (folders["gz"] / "train.csv.gz").write_bytes(gzip.compress(b"text\nx\n"))
    (folders["field"] / "train.json").write_text('{"data": [{"text": "x"}, {"text": "y"}]}')
    card = "---\nconfigs:\n- config_name: default\n  field: data\n  data_files: train.json\n---\n"
    (folders["field"] / "README.md").write_text(card)
    (folders["lines"] / "train.txt").write_text("x\n\ny\n")
    expected = {
        "shards": ["x", "y"],
        "tabs": ["x, with a comma"],
        "gz": ["x"],
        "field": ["x", "y"],
        "lines": ["x", "y"],
    }
    for name, folder in folders.items():
        for streaming in (False, True):
            prompts = dataset_prompts(DatasetSpec(str(folder), streaming=streaming), Columns())
            assert texts_of(prompts) == expected[name], name
    (folders["shards"] / "train-1.csv").write_text("b,text\n2,y, z\n")
    with pytest.raises(PromptError, match=r"train-1\.csv, line 2: expected as many cells"):
        list(dataset_prompts(DatasetSpec(str(folders["shards"])), Columns()))


def test_options_of_a_card_that_would_guess_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text;n\na, b;1\n")
    card = "---\nconfigs:\n- config_name: default\n  {option}\n  data_files: train.csv\n---\n"
    (tmp_path / "README.md").write_text(card.replace("{option}", 'sep: ";"'))
    assert texts_of(dataset_prompts(DatasetSpec(str(tmp_path)), Columns())) == ["a, b"]
    (tmp_path / "README.md").write_text(card.replace("{option}", "skiprows: 1"))
    with pytest.raises(PromptError, match=r"no more of its \.csv files than sep and quotechar, got skiprows"):
        list(dataset_prompts(DatasetSpec(str(tmp_path)), Columns()))


def test_the_table_beside_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"not an image")  # never opened
    (tmp_path / "metadata.csv").write_text('text,file_name\n"a cat, on a mat",1.png\nNone,2.png\n')
    for streaming in (False, True):
        spec = DatasetSpec(str(tmp_path), streaming=streaming)
        assert texts_of(dataset_prompts(spec, Columns())) == ["a cat, on a mat", "None"]
    (tmp_path / "metadata.csv").write_text("text,file_name\na cat, on a mat,1.png\nNone,2.png\n")
    with pytest.raises(PromptError, match=r"metadata\.csv, line 2: expected as many cells"):
        list(dataset_prompts(DatasetSpec(str(tmp_path)), Columns()))


def test_parts_of_splits(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(10)))
    (tmp_path / "test.jsonl").write_text('{"text": "x"}\n')

    def read(split: str, streaming: bool = False) -> list[str]:
        return texts_of(dataset_prompts(DatasetSpec(str(tmp_path), split=split, streaming=streaming), Columns()))

    assert read("train[:2]") == ["0", "1"] and read("train[-20%:]+test") == ["8", "9", "x"] and read("test") == ["x"]
    for split, streaming in (("valid", False), ("valid[:2]", False), ("train[:2]", True)):
        with pytest.raises(PromptError, match="Unknown split"):
            read(split, streaming)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A stream of rows: the first prompts come before the rest, even a damaged rest, is read."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 5 + "{damaged")
    assert texts_of(load_prompts(str(tmp_path / "train.jsonl"), 5)) == ["a"] * 5
    rows = dataset_prompts(DatasetSpec(str(tmp_path), streaming=True), Columns())
    assert [next(rows).text for _ in range(5)] == ["a"] * 5
    with pytest.raises(PromptError, match="line 6"):
        next(rows)
