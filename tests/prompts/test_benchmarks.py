"""Prompt files of published benchmarks in their own shapes, and prompts that a word list leaves out."""

import json
from pathlib import Path

import pytest

from rlr_peft.build import read_prompts
from rlr_peft.config import config_from_dict
from rlr_peft.prompt import PromptError
from rlr_peft.prompts import Columns, load_prompts

GENEVAL = {"tag": "counting", "include": [{"class": "bird", "count": 2}], "prompt": "a photo of two birds"}
FILES = {
    "evaluation_metadata.jsonl": (
        json.dumps(GENEVAL),
        [("a photo of two birds", {"tag": "counting", "include": [{"class": "bird", "count": 2}]})],
    ),
    "geneval2_data.jsonl": (
        json.dumps({"prompt": "a red fox", "vqa_list": [["What animal is it?", "fox"]], "atom_count": 2}),
        [("a red fox", {"vqa_list": [["What animal is it?", "fox"]], "atom_count": 2})],
    ),
    "drawbench.csv": (
        "Prompts,Category\nA red colored car.,Colors\n",
        [("A red colored car.", {"Category": "Colors"})],
    ),
    "PartiPrompts.tsv": (
        'Prompt\tCategory\tChallenge\tNote\na "tall" tree\tArts\tBasic\t\n',
        [('a "tall" tree', {"Category": "Arts", "Challenge": "Basic"})],
    ),
    "train.json": (
        json.dumps([{"human_preference": [1, 0], "prompt": "a sea", "file_path": ["1.jpg", "2.jpg"]}]),
        [("a sea", {})],
    ),
    "test.json": (
        json.dumps([{"prompt": "a sea", "image_path": ["1.jpg"], "rank": [1], "raw_annotations": []}]),
        [("a sea", {})],
    ),
    "anime.json": ('["a girl on a cliff",\n "a knight"]', [("a girl on a cliff", {}), ("a knight", {})]),
    "dpg_bench.csv": (
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
        "p1,a cat and a hat,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
        "p1,a cat and a hat,,2,0,entity,whole,entity - whole (hat),Is there a hat?\n"
        "p2,a sea,,1,0,entity,whole,entity - whole (sea),Is there a sea?\n",
        [
            ("a cat and a hat", {"item_id": "p1", "questions": ["Is there a cat?", "Is there a hat?"]}),
            ("a sea", {"item_id": "p2", "questions": ["Is there a sea?"]}),
        ],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_benchmarks_file_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_text(content)
    prompts = load_prompts(str(tmp_path / name))
    assert [(prompt.text, dict(prompt.metadata)) for prompt in prompts] == expected


def test_columns_that_are_named_win(tmp_path: Path) -> None:
    (tmp_path / "geneval.jsonl").write_text(json.dumps(GENEVAL))
    (prompt,) = load_prompts(str(tmp_path / "geneval.jsonl"), columns=Columns("prompt"))
    assert prompt.text == GENEVAL["prompt"] and not prompt.metadata


def test_a_word_list_leaves_prompts_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts, words = tmp_path / "prompts.txt", tmp_path / "words.txt"
    prompts.write_text("a Blood red sky\na bloodhound\nan open wound, seen\na cat\n")
    words.write_text("blood\n\nopen wound\n")
    values = {
        "pretrained_model_name_or_path": "base",
        "prompt_path": str(prompts),
        "evaluation_prompt_path": str(prompts),
        "reward_fn": "jpeg",
        "prompt_filter": str(words),
    }
    with caplog.at_level("INFO"):
        found = read_prompts(config_from_dict(values))
    assert [str(prompt) for prompt in found.training] == [
        "a bloodhound",
        "a cat",
    ] and found.evaluation == found.training
    assert "2 of 4 prompts are left out" in caplog.text
    words.write_text("a\nan\n")
    with pytest.raises(PromptError, match="it leaves none of 4 prompts; correct the list"):
        read_prompts(config_from_dict(values))
    with pytest.raises(PromptError, match="cannot be read: No such file"):
        read_prompts(config_from_dict(values | {"prompt_filter": "none.txt"}))
