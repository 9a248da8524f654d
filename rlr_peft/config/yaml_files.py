"""Reading and writing the flat YAML of a configuration."""

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from rlr_peft.config.arguments import Config, check_names, config_to_dict, knobs
from rlr_peft.config.knob import ConfigError
from rlr_peft.durable_files import replacing_file
from rlr_peft.foreign_text import one_line, printable
from rlr_peft.plain_files import (
    AMBIGUOUS,
    AMBIGUOUS_TAG,
    YAML_VALUES,
    PlainFileError,
    parse_yaml,
    read_plain_text,
)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `parse_yaml` or a YAML 1.1 reader takes for something else, such as `no` or `12e4`."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """In double quotes where it holds what `printable` writes out: only there an escape is one."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text == printable(text) else '"')


_Dumper.add_representer(str, _text)


for _tag, _pattern, _first in YAML_VALUES:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))
_Dumper.add_implicit_resolver(AMBIGUOUS_TAG, re.compile(rf"(?:{AMBIGUOUS.pattern})$"), None)


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat names and values of a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing or unreadable, is not a mapping, or holds an unknown name or one name twice.
    """
    try:
        values = parse_yaml(read_plain_text(path))
    except PlainFileError as error:
        raise ConfigError(f"--config {path}: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        got = "a list" if isinstance(values, list) else "one value"
        raise ConfigError(f"--config {path}: expected lines of `name: value`, got {got}.")
    check_names(iter(values), f"--config {path}")
    return values


def config_to_yaml(config: Config) -> str:
    """The full configuration as flat YAML, one commented block per group; `load_config` reads it back equal."""
    values = config_to_dict(config)
    blocks = []
    for title, members in groupby(knobs().values(), key=lambda knob: knob.group_title):
        block = {knob.name: values[knob.name] for knob in members}
        blocks.append(f"# {title}\n{yaml_text(block)}")
    return "\n".join(blocks)


def yaml_text(values: Mapping[str, Any]) -> str:
    """Plain values as YAML without a raw control character or the like, which mean the same when they are read."""
    return printable(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def save_config(config: Config, path: str | Path, objects: Mapping[str, str] | None = None) -> None:
    """Writes the full resolved configuration; the file is complete or, after a crash, as it was before.

    Args:
        objects: what came as a Python object, which no file holds, with its name: a comment says so.
    """
    text = config_to_yaml(config)
    if objects:
        named = one_line(", ".join(f"{part} ({name})" for part, name in objects.items()))
        first = f"# Given as objects: {named}.\n# This file alone does not start such a run; the same Python does.\n"
        text = f"{first}\n{text}"
    with replacing_file(Path(path)) as aside:
        aside.write_text(text, encoding="utf-8")
