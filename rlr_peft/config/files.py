"""The flat YAML of a configuration: read, written, and found.

A config that was not given but found, beside an adapter, may be somebody else's. Its words can make the program run
code (a reward's file or module), connect and send (addresses of rewards and language models), write (folders, caches)
or show what lies on this machine (files of prompts). So of its texts only those are taken whose knob says of what kind
they are (`knob(found=...)`), and only as far as they are harmless:

- `words`: any text: it is compared, shown or drawn;
- `model`: a Hub id or a local folder, of which weights and configs are read, never code;
- `prompts`: a built-in set, or a file in the config's own folder; of several sources Hub ids of datasets too;
- `dataset`: a Hub id;
- `reward`: a registered name.
"""

import os
import re
from collections.abc import Collection, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from rlr_peft.config.arguments import Config, check_names, config_to_dict, knobs, refuse_gone
from rlr_peft.config.knob import ConfigError, Knob
from rlr_peft.config.prompts import BUILTIN_SETS, is_hub_dataset
from rlr_peft.files import (
    AMBIGUOUS,
    AMBIGUOUS_TAG,
    YAML_VALUES,
    PlainFileError,
    parse_yaml,
    read_plain_text,
    replacing_file,
)
from rlr_peft.foreign_text import one_line, printable


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


def read_config(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The typed values that a YAML file gives to these names; what else it holds is passed over.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown name or a wrong type.
    """
    where = f"--config {path}: "
    written = _read_yaml(path)
    refuse_gone(written, where)
    return {name: knobs()[name].read(value, where) for name, value in written.items() if name in names}


def _read_yaml(path: Path) -> dict[str, Any]:
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


_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # no colon: every form of a reward but the registered names has one


def config_beside(adapter: str) -> Path | None:
    """The config of the run that left this adapter, if it lies on this machine."""
    folder = Path(adapter).expanduser()
    folder = folder.parent if folder.is_file() else folder
    places = [folder / "config.yaml"]
    if folder.name.startswith("checkpoint-"):
        places.append(folder.parent / "config.yaml")
    return next((place for place in places if place.is_file()), None)


def read_found_config(path: Path, names: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The plain values of a config that was found, and the names of those that were left out, in part or whole.

    Args:
        names: those that matter; the others are passed over.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown name or a wrong type.
    """
    given = {name: value for name, value in read_config(path, names).items() if value != knobs()[name].default}
    kept = {name: _plain(knobs()[name], value, path.parent) for name, value in given.items()}
    left_out = [name for name, value in given.items() if kept[name] != value]
    return {name: value for name, value in kept.items() if value is not None}, left_out


def _plain(knob: Knob, value: Any, folder: Path) -> Any:
    """As much of a value as is harmless; None for nothing."""
    if isinstance(value, dict):
        takes_datasets = knob.field.metadata["found"] == "prompts"
        return {
            key: item
            for key, item in value.items()
            if _is_harmless(knob, key, folder) or (takes_datasets and is_hub_dataset(key))
        } or None
    if isinstance(value, tuple):
        return tuple(item for item in value if not isinstance(item, str) or _is_harmless(knob, item, folder)) or None
    is_text = isinstance(value, str) and knob.takes_text
    return value if not is_text or _is_harmless(knob, value, folder) else None


def _is_harmless(knob: Knob, text: str, folder: Path) -> bool:
    match knob.field.metadata["found"]:
        case "words":
            return True
        case "model":
            # No address, and no folder of another machine.
            return "://" not in text and not text.startswith(("//", "\\\\"))
        case "prompts":
            return text in BUILTIN_SETS or _is_file_inside(Path(text).expanduser(), folder)
        case "dataset":
            return _NAME.fullmatch(text) is not None and not os.path.exists(text)
        case "reward":
            return _NAME.fullmatch(text) is not None
        case _:
            return False


def _is_file_inside(path: Path, folder: Path) -> bool:
    """Links are followed: one that came with the folder may point anywhere."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())
