"""Stage prompts: answers of models are checked, remembered in a file, and asked for again where malformed."""

import json
from pathlib import Path
from types import MappingProxyType

import pytest

from rlr_peft.prompt import Prompt, PromptError, texts_of
from rlr_peft.prompts import (
    MalformedStagesError,
    RememberedStages,
    decompose_prompts,
    parse_stages,
    read_stages,
    staged_prompt,
)

NAMES = ("coarse", "fine")


class Counted:
    """Splits by rote, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: str) -> tuple[str, ...]:
        self.asked.append(prompt)
        return f"far {prompt}", f"near {prompt}"


def test_each_text_is_split_once_and_keeps_what_it_carries() -> None:
    split = Counted()
    given = [Prompt("a", "ugly", metadata={"n": 1}), Prompt("b"), Prompt("a")]
    staged = decompose_prompts(given, split)
    assert split.asked == ["a", "b"] and texts_of(staged) == ["a", "b", "a"]
    assert [prompt.stages for prompt in staged] == [("far a", "near a"), ("far b", "near b"), ("far a", "near a")]
    assert staged[0].negative_prompt == "ugly" and staged[0].metadata == {"n": 1}


@pytest.mark.parametrize(
    "answer",
    [
        '{"coarse": " a ", "fine": "b"}',
        'Sure!\n```json\n{"fine": "b", "coarse": "a"}\n```',
        '{"coarse":"a","fine":"b"}}}',
        'The stages {coarse, fine} are {"coarse": "a", "fine": "b"}.',
    ],
)
def test_answers_with_one_object_are_read(answer: str) -> None:
    assert parse_stages(answer, NAMES) == ("a", "b")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("I cannot do that", "no JSON object"),
        ('{"coarse": "a", "fine": ', "not valid JSON"),
        ('{"coarse": ' * 4_000, "nested too deeply"),
        ('{"coarse": ' + "1" * 5_000, "a number too long"),
        ("{" * 50_001, "expected at most 50000 characters, got 50001"),
        ("{so} and {so", r"not valid JSON \(.* at character 1\)"),
        ('{"coarse": "a"}', "expected the keys coarse, fine, got coarse"),
        ('{"coarse": "a", "fine": "b", "extra": "c"}', "got coarse, fine, extra"),
        ('{"coarse": "a", "fine": 3}', "expected a text for fine, got 3"),
        ('{"coarse": " ", "fine": "b"}', "expected a text for coarse"),
        ('{"coarse": "a", "fine": "' + "b" * 1001 + '"}', "expected at most 1000 characters for fine, got 1001"),
    ],
)
def test_malformed_answers(answer: str, message: str) -> None:
    with pytest.raises(MalformedStagesError, match=message):
        parse_stages(answer, NAMES)


def test_the_file_is_read_edited_and_continued(tmp_path: Path) -> None:
    path, split = tmp_path / "new" / "stages.jsonl", Counted()
    remembered = RememberedStages(split, path, NAMES)
    assert remembered("ein Käfer") == ("far ein Käfer", "near ein Käfer") == remembered("ein Käfer")
    assert remembered("b") == ("far b", "near b") and split.asked == ["ein Käfer", "b"]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"prompt": "ein Käfer", "coarse": "far ein Käfer", "fine": "near ein Käfer"}
    assert "Käfer" in lines[0], "people edit this file"

    path.write_text(lines[0].replace("far ein", "edited") + "\n\n" + lines[1], encoding="utf-8")  # no last newline
    again = RememberedStages(split, path, NAMES)
    assert again("ein Käfer") == ("edited Käfer", "near ein Käfer") and again("c") == ("far c", "near c")
    assert split.asked == ["ein Käfer", "b", "c"]
    assert RememberedStages(split, path, NAMES)("c") == ("far c", "near c") and split.asked[-1] == "c"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "line 2: expected"),
        ('{"coarse": "a", "fine": "b"}', "line 2: .*'prompt'"),
        ('{"prompt": "x", "coarse": "a", "mid": "b"}', "line 2: .*expected the keys coarse, fine, got coarse, mid"),
        ('{"prompt": "x", "coarse": "a", "fine": ""}', "line 2: .*expected a text for fine"),
        ("[]", "line 2: expected"),
        ('{"prompt": "x", "coarse": "a", "fine": "b", "fine": "c"}', 'line 2: .*"fine" is given twice'),
        ("[" * 100_000, "line 2: .*nested deeper than 20 levels"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "stages.jsonl"
    path.write_text('{"prompt": "a", "coarse": "a", "fine": "b"}\n' + line + "\n")
    with pytest.raises(PromptError, match=message):
        RememberedStages(Counted(), path, NAMES)


def test_a_line_that_was_cut_off_within_a_letter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stages.jsonl"
    whole = '{"prompt": "a", "coarse": "a", "fine": "b"}\r\n{"prompt": "ein Kä'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + whole[:-1])
    with pytest.raises(PromptError, match=r"stages.jsonl, line 2: expected .* correct or delete the line"):
        read_stages(path, NAMES)
    path.write_bytes(b"\xef\xbb\xbf" + whole[: whole.index(b"\n")])
    assert read_stages(path, NAMES) == {"a": ("a", "b")}


def test_what_people_give() -> None:
    split = Counted()
    assert staged_prompt("a", NAMES, split).stages == ("far a", "near a")
    assert staged_prompt({"fine": "y", "coarse": "x"}, NAMES, split).stages == ("x", "y")
    assert staged_prompt(["x", "y"], NAMES, split).stages == ("x", "y")
    assert staged_prompt(MappingProxyType({"fine": "y", "coarse": "x"}), NAMES, split).stages == ("x", "y")
    full = Prompt("a", "ugly", ("x", "y"), {"n": 1})
    kept = staged_prompt(full, NAMES, split)
    assert (kept.stages, kept.negative_prompt, kept.metadata) == (("x", "y"), "ugly", {"n": 1})
    for wrong, message in (
        (Prompt("a", stages=("x",)), "expected one text for each of coarse, fine, got 1"),
        (["x", None], "expected one text for each of coarse, fine, got 2: "),
        (["x", " "], "expected a text for fine"),
        ({"coarse": "x"}, "expected the keys coarse, fine, got coarse"),
        (["x", "y", "z"], "expected one text for each of coarse, fine, got 3"),
    ):
        with pytest.raises(PromptError, match=message):
            staged_prompt(wrong, NAMES, split)  # type: ignore[arg-type]
    for answer, message in ((("x",), "got 1"), ("xy", "got 'xy'"), (None, "got None")):
        with pytest.raises(PromptError, match=f"stage prompts of 'a': expected one text for each of .*{message}"):
            staged_prompt("a", NAMES, lambda prompt, answer=answer: answer)  # type: ignore[misc]
