"""Prompts from real .jsonl, .csv and .parquet files and from dataset folders, whole and streamed."""

import json
import logging
from pathlib import Path

import datasets
import pytest

from rlr_peft.config import BUILTIN_SETS
from rlr_peft.prompt import Prompt, PromptError, texts_of
from rlr_peft.prompts import Columns, DatasetSpec, dataset_prompts, load_prompts

ROWS = [
    {"text": "a cat", "ugly": "blurry", "far": "a room", "near": "fur", "points": 3, "tags": ["x", "y"]},
    {"text": "  a dog ", "ugly": None, "far": "a park", "near": "ears", "points": 4, "tags": ["z"]},
    {"text": "日本の猫", "ugly": "", "far": "a street", "near": "eyes", "points": 5, "tags": []},
]
COLUMNS = Columns("text", "ugly", ("far", "near"), ("points",))


def write_rows(folder: Path, ending: str, rows: list[dict[str, object]]) -> Path:
    path = folder / f"train{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    table = datasets.Dataset.from_list(rows)
    table.to_csv(path) if ending == ".csv" else table.to_parquet(path)
    return path


def check_rows(prompts: list[Prompt], ending: str) -> None:
    assert texts_of(prompts) == ["a cat", "a dog", "日本の猫"]
    assert [prompt.negative_prompt for prompt in prompts] == ["blurry", "", ""]
    assert [prompt.stages for prompt in prompts] == [("a room", "fur"), ("a park", "ears"), ("a street", "eyes")]
    points = ["3", "4", "5"] if ending == ".csv" else [3, 4, 5]  # a cell of a .csv is the text that is written
    assert [prompt.metadata for prompt in prompts] == [{"points": point} for point in points]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_files_and_folders_give_the_same_prompts(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path, ending, ROWS)
    check_rows(load_prompts(str(path), columns=COLUMNS), ending)
    assert texts_of(load_prompts(str(path), 2)) == ["a cat", "a dog"]
    for streaming in (False, True):
        check_rows(list(dataset_prompts(DatasetSpec(str(tmp_path), streaming=streaming), COLUMNS)), ending)


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".csv", [{"text": "a cat"}])
    assert texts_of(load_prompts(str(path))) == ["a cat"]
    path.write_text("text\na dog\n")
    assert texts_of(load_prompts(str(path))) == ["a dog"]


def test_metadata_may_be_nested_but_not_without_end(tmp_path: Path) -> None:
    """A reward gets a copy of it, and a server its JSON: neither can be made of any depth."""
    value: object = 1
    for _ in range(20):
        value = {"a": [value]} if isinstance(value, int) else [value]
    path = write_rows(tmp_path, ".jsonl", [{"text": "a cat", "deep": {"a": [1]}}, {"text": "a dog", "deep": value}])
    with pytest.raises(PromptError, match="line 2: expected lists and mappings in at most 20 levels in column deep"):
        load_prompts(str(path), columns=Columns("text", metadata=("deep",)))
    assert texts_of(load_prompts(str(path), columns=Columns("text"))) == ["a cat", "a dog"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_missing_column_lists_those_that_are_there(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path, ending, ROWS)
    message = "no column caption, mid; its columns are text, ugly, far, near, points"
    columns = Columns("caption", stages=("mid", "far"))
    with pytest.raises(PromptError, match=message):
        load_prompts(str(path), columns=columns)
    for streaming in (False, True):
        with pytest.raises(PromptError, match=message):
            list(dataset_prompts(DatasetSpec(str(tmp_path), streaming=streaming), columns))


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    """A damaged image beside the captions does not matter: it is never decoded."""
    rows = [{"text": "a cat", "image": {"bytes": b"not an image", "path": None}}]
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    assert texts_of(dataset_prompts(DatasetSpec(str(tmp_path)), Columns())) == ["a cat"]
    assert texts_of(dataset_prompts(DatasetSpec(str(tmp_path), streaming=True), Columns())) == ["a cat"]


def test_empty_cells_are_counted_and_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path, ".jsonl", [{"text": "a"}, {"text": None}, {"text": " \t"}, {"text": "b"}])
    with caplog.at_level(logging.WARNING):
        assert texts_of(load_prompts(str(path))) == ["a", "b"]
    assert caplog.messages == [
        f"prompts '{path}': 2 of 4 rows have no text in column text and are left out, the first is line 2."
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "it holds no row"),
        ("empty.csv", "", "it holds no row"),
        ("header.csv", "text\n", "it has no text in column text"),
        (
            "broken.jsonl",
            '{"text": "a"}\n{bad\n',
            "line 2: cannot be read as JSON: Expecting property name .* at character 2",
        ),
        ("broken.csv", 'text,n\n"unclosed,1\n', "line 2: cannot be read as CSV from here: unexpected end of data"),
        ("broken.parquet", "PAR1", "cannot be read"),
        (
            "mixed.jsonl",
            '{"text": "a"}\n{"text": 5}\n',
            "line 2: expected text in column text, got int 5; its columns are text",
        ),
        ("blank.jsonl", '{"text": ""}\n{"text": null}\n', "its 2 rows have no text in column text"),
    ],
)
def test_damaged_and_empty_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=message) as caught:
        load_prompts(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_stage_without_a_prompt_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".jsonl", [ROWS[0], {**ROWS[1], "near": " "}])
    with pytest.raises(PromptError, match="line 2: expected a text in column near, got none"):
        load_prompts(str(path), columns=COLUMNS)


def test_plain_lines_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    for spec in (str(tmp_path / "prompts.txt"), "simple-animals"):
        with pytest.raises(PromptError, match="expected a table with columns far, near, got plain lines"):
            load_prompts(spec, columns=Columns(stages=("far", "near")))


@pytest.mark.parametrize("name", ["p[1].csv", "p*.csv", "p?.csv"])
def test_names_are_no_patterns(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "run[1]", tmp_path / "run1"):
        folder.mkdir()
        (folder / "p1.csv").write_text("text\nanother file\n")
    (tmp_path / "run[1]" / name).write_text("text\nthis file\n")
    monkeypatch.chdir(tmp_path / "run[1]")
    for path in (name, str(tmp_path / "run[1]" / name)):
        assert texts_of(load_prompts(path)) == ["this file"]
    for streaming in (False, True):
        with pytest.raises(PromptError, match=r"expected a folder without \*, \? and \[ in its path"):
            list(dataset_prompts(DatasetSpec(str(tmp_path / "run[1]"), streaming=streaming), Columns()))


def test_no_such_dataset_split_or_configuration(tmp_path: Path) -> None:
    write_rows(tmp_path, ".jsonl", ROWS)
    with pytest.raises(PromptError, match='Unknown split "test"'):
        list(dataset_prompts(DatasetSpec(str(tmp_path), split="test"), Columns()))
    with pytest.raises(PromptError, match="BuilderConfig 'large' not found"):
        list(dataset_prompts(DatasetSpec(str(tmp_path), config_name="large"), Columns()))
    with pytest.raises(PromptError, match="cannot be read"):
        list(dataset_prompts(DatasetSpec(str(tmp_path / "absent")), Columns()))


def test_every_name_that_the_configuration_allows_is_a_set() -> None:
    for name in BUILTIN_SETS:
        assert len(load_prompts(name)) > 1, name


def test_the_built_in_animals() -> None:
    animals = load_prompts("simple-animals")
    train, test = load_prompts("simple-animals/train"), load_prompts("simple-animals/test")
    assert len(animals) == len(set(animals)) == 45
    assert set(train) | set(test) == set(animals) and len(train) == 39 and not set(train) & set(test) and len(test) == 6
