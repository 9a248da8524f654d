"""Reading and writing the flat YAML of a configuration."""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from rlr_peft.config.arguments import Config
from rlr_peft.config.flat import check_names, config_to_dict, knobs
from rlr_peft.config.knob import ConfigError
from rlr_peft.durable_files import replacing_file


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `no` is text (as in `mixed_precision: no`) and `1e-4` a number; no name twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (add_implicit_resolver fills it)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{', '.join(twice)} is given twice; keep one.")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` or a YAML 1.1 reader would take for something else, such as `no` or `12e4`."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _yaml_class in (_Loader, _Dumper):
    for _tag, _pattern, _first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
        ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
        ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ):
        _yaml_class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat names and values of a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing or unreadable, is not a mapping, or holds an unknown name or one name twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(
            f"--config {path}: cannot be read ({error.strerror}); give the path of a YAML file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML ({problem_in_yaml(error)}).") from None
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected lines of `name: value`, got a {type(values).__name__}.")
    check_names((str(name) for name in values), f"--config {path}")
    return values


def problem_in_yaml(error: Exception) -> str:
    """What is wrong, and where; the line itself is not quoted, as it may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    said = " ".join(filter(None, (error.context, error.problem)))
    return place + re.sub(r"(alias|anchor|tag|handle) '.*?'", r"\1", said)  # a password may begin with `*`, `&` or `!`


def config_to_yaml(config: Config) -> str:
    """The full configuration as flat YAML, one commented block per group; `load_config` reads it back equal."""
    values = config_to_dict(config)
    blocks = []
    for title, members in groupby(knobs().values(), key=lambda knob: knob.group_title):
        block = {knob.name: values[knob.name] for knob in members}
        text = yaml.dump(block, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
        blocks.append(f"# {title}\n{text}")
    return "\n".join(blocks)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the full resolved configuration; the file is complete or, after a crash, as it was before."""
    with replacing_file(Path(path)) as aside:
        aside.write_text(config_to_yaml(config), encoding="utf-8")
