"""Small YAML and JSON files as people write them, and as somebody writes them who means harm."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rlr_peft.config import ConfigError, load_config, read_quantization
from rlr_peft.files import MAX_BYTES, PlainFileError, parse_json, parse_yaml, read_plain_text

REQUIRED = "--pretrained_model_name_or_path tiny-shapes --prompt_path tiny-shapes/train --reward_fn tiny-shapes".split()

NESTED = "[" * 5000 + "]" * 5000
LAUGHS = "[&a [x, x]," + ",".join(f"&{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefghij", "bcdefghijk")) + "]"

REFUSED_YAML = [
    ("rank: 4\nseed: 1\nrank: 5\n", "line 3, column 1: rank is given twice, the first time in line 1; keep one."),
    ("reward_fn:\n  a: 1\n  a: 2\n", "line 3, column 3: a is given twice, the first time in line 2; keep one."),
    ("reward_fn: {1: 1, '1': 2}\n", "line 1, column 19: 1 is given twice"),
    ("rank: 0x10\n", "line 1: rank: expected a whole number, got 0x10; write it in plain decimal digits."),
    ("seed: 1\nrank: 010\n", "line 2: rank: expected a whole number, got 010; write it in plain decimal digits."),
    ("rank: 0o10\n", "got 0o10; write it in plain decimal digits."),
    ("rank: 1:30\n", "got 1:30; write it in plain decimal digits."),
    ("rank: 1_000\n", "got 1_000; write it in plain decimal digits."),
    ("rank: '0x10'\n", "rank: expected a whole number, got 0x10; write it in plain decimal digits."),
    ("learning_rate: 1_0e-4\n", "learning_rate: expected a number or auto, got 1_0e-4; write it in plain decimal"),
    ("reward_fn: {a: 0x10}\n", "line 1: reward_fn: expected a mapping of names to numbers or a text, got 0x10"),
    ("ho_window: [0x1, 0x5]\n", "ho_window: expected steps or names or null, got 0x1; write it in plain decimal"),
    ("rank: ٤\n", "rank: expected a whole number, got ٤; write it in plain decimal digits."),
    ("rank: off\n", "rank: expected a whole number, got off; write it in plain decimal digits."),
    ("use_dora: yes\n", "line 1: use_dora: expected true or false, got yes; write true or false."),
    ("use_dora: Off\n", "use_dora: expected true or false, got Off; write true or false."),
    ("tracker_name: on\n", "line 1: tracker_name: expected a text, got on; put quotes around it"),
    ("revision: 0x10\n", "revision: expected a text or null, got 0x10; put quotes around it"),
    ("validation_prompt: [a, no]\n", "validation_prompt: expected one or more texts or null, got no; put quotes"),
    (f"rank: {NESTED}\n", "line 1, column 26: nested deeper than 20 levels; write it flat."),
    ("rank: " + "{a: " * 3000, "nested deeper than 20 levels"),
    ("- " * 50_000, "nested deeper than 20 levels"),
    (
        "rank: &a [*a, *a]\n",
        "line 1, column 7: anchors (&) and aliases (*) are not read; write the value out, or quote it.",
    ),
    (f"validation_prompt: {LAUGHS}\n", "line 1, column 21: anchors (&) and aliases (*) are not read"),
    ("rank: " + "9" * 6000, "line 1, column 7: expected a number of at most 300 digits, got 6000."),
    ("learning_rate: " + "9" * 6000 + ".5", "expected a number of at most 300 digits, got 6002."),
    ("rank: !!python/object/apply:os.system ['touch pwned']\n", "tags (!) are not read"),
    ("rank: !!int 1:30\n", "line 1, column 7: tags (!) are not read; write the plain value, or quote it."),
    ("rank: !!map 4\n", "tags (!) are not read"),
    ("? [a, b]\n: 1\n", "line 1, column 3: expected a name before the colon, got a list."),
    ("rank:\t4\n", r"line 1, column 6: not valid YAML: found character '\t'"),
    ("rank: 4\n---\nrank: 5\n", "line 2, column 1: not valid YAML: but found another document"),
    ("- rank: 4\n", "expected lines of `name: value`, got a list."),
    ("rank\n", "expected lines of `name: value`, got one value."),
    ("seed: 1\nrank: 4\x00\n", "line 2: expected UTF-8 text, got a NUL; save the file as UTF-8."),
    ("seed: 1\ntracker_name: a\x07\n", "line 2: not valid YAML: the character U+0007 is in it."),
    ("# " + "x" * MAX_BYTES, "expected at most 256 KiB, got a file of 256 KiB."),
]


def refusal(path: Path) -> str:
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED, "--config", str(path)])
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert message.startswith(f"--config {path}: ") and "\n" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize(("text", "message"), REFUSED_YAML, ids=[repr(text[:20]) for text, _ in REFUSED_YAML])
def test_unclear_or_harmful_yaml_is_one_sentence_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert message in refusal(path)
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_another_encoding_and_what_is_no_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("seed: 1\ntracker_name: café\n".encode("latin-1"))
    assert "line 2: expected UTF-8 text, got the byte 0xe9; save the file as UTF-8." in refusal(path)
    path.write_bytes("rank: 4\n".encode("utf-16"))
    assert "line 1: expected UTF-8 text, got the byte 0xff" in refusal(path)
    path.write_bytes(b"\xef\xbb\xbfrank: 7\r\n")
    assert load_config([*REQUIRED, "--config", str(path)]).lora.rank == 7
    assert "expected a file, got a folder" in refusal(tmp_path)
    assert "expected a file, got a device or a pipe" in refusal(Path("/dev/zero"))
    (tmp_path / "broken").symlink_to("nowhere")
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "broken")
    assert "got neither" in refusal(tmp_path / ("x" * 300))
    with pytest.raises(PlainFileError, match="embedded null"):
        read_plain_text(Path("a\0b"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rank 0x10", "rank: expected a whole number, got 0x10; write it in plain decimal digits."),
        ("--rank=010", "rank: expected a whole number, got 010"),
        ("--rank 1_000", "rank: expected a whole number, got 1_000"),
        ("--seed 1:30", "seed: expected a whole number, got 1:30"),
        ("--ho_window 1 0x5", "ho_window: expected steps or names or null, got 0x5"),
        ("--use_dora yes", "use_dora: expected true or false, got yes; write true or false."),
        ('--reward_fn {"a":&x1,"b":*x}', "reward_fn: line 1, column 6: anchors (&) and aliases (*) are not read"),
        ("--reward_minimum {a:" + NESTED + "}", "reward_minimum: line 1, column 23: nested deeper than 20 levels"),
        ('--reward_fn {"a":1,"a":2}', "reward_fn: line 1, column 8: a is given twice"),
        ('--reward_fn {"a":0x10}', "reward_fn: expected a mapping of names to numbers or a text, got 0x10"),
        ('--reward_model_path {"a":010}', "reward_model_path: expected a mapping of names to texts or null, got 010"),
        ("--rank " + "9" * 6000, "rank: expected a whole number, got 9999"),
    ],
)
def test_flags_are_read_as_strictly(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED, *argv.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_plain_values_mean_what_yaml_1_2_says(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "mixed_precision: no\nrank: '8'\nlearning_rate: 2.5e-3\nuse_dora: true\nrevision: '0x10'\n"
        "tracker_name: 2024-01-01\nvalidation_prompt: ['no', a, \"1:30\"]\n",
        encoding="utf-8",
    )
    flags = ["--hub_revision", "010", "--dataset_split", "yes", "--reward_model_path", "{a: '010', b: c d}"]
    config = load_config([*REQUIRED, "--config", str(path), *flags])
    assert type(config.model.mixed_precision) is str and config.model.mixed_precision == "no"
    assert (config.lora.rank, config.optimizer.learning_rate, config.lora.use_dora) == (8, 0.0025, True)
    assert (config.model.revision, config.logging.tracker_name) == ("0x10", "2024-01-01")
    assert config.validation.validation_prompt == ("no", "a", "1:30")
    assert (config.hub.hub_revision, config.prompts.dataset_split) == ("010", "yes")
    assert config.reward.reward_model_path == {"a": "010", "b": "c d"}


@pytest.mark.parametrize("text", [r'tracker_name: "a\0b"', r'output_dir: "\e[31m"', r'negative_prompt: "\ud800"'])
def test_characters_that_no_path_or_prompt_holds_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a text without control characters, got '"):
        load_config([*REQUIRED, "--config", str(path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"load_in_4bit": true, "load_in_4bit": false}', '"load_in_4bit" is given twice in one object; keep one'),
        ('{"a": {"b": 1, "b": 2}}', '"b" is given twice'),
        ('{"a": ' + "[" * 100_000, "nested deeper than 20 levels"),
        ('{"a": ' + "[" * 20 + "]" * 20 + "}", "nested deeper than 20 levels"),
        ('{"a": ' + "9" * 6000 + "}", "expected a number of at most 300 digits, got 6000"),
        ('{"a": 0x10}', "line 1, column 8: not valid JSON"),
        ('{"a": NaN}', "expected finite numbers, got NaN"),
        ('{"load_in_4bit": true', "line 1, column 22: not valid JSON"),
        ("[1]", "expected an object with load_in_4bit or load_in_8bit true, got neither"),
        ('{"load_in_4bit": "false"}', "true, got neither"),
    ],
)
def test_json_that_a_user_gives_is_as_strict(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bnb.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_quantization(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("value", [{"a": [1, -2.5, None, True, "x"], "b": {"c": ""}}, [], 0, 1e300, "0x10"])
def test_plain_json_is_read_as_ever_and_is_yaml_too(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text) == parse_yaml(text)
