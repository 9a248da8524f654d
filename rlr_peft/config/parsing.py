"""From command line and YAML file to a checked Config; jsonargparse does the typing."""

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from rlr_peft.config.arguments import Config
from rlr_peft.config.checks import MAY_BE_EMPTY
from rlr_peft.config.flat import check_names, config_from_dict, knobs
from rlr_peft.config.knob import ConfigError
from rlr_peft.config.wording import (
    clear_value,
    element_type,
    explain,
    help_text,
    placeholder,
    takes_mapping,
    takes_text,
    type_in_words,
)
from rlr_peft.config.yaml_files import read_yaml
from rlr_peft.foreign_text import say
from rlr_peft.plain_files import PlainFileError, parse_yaml
from rlr_peft.redaction import redacted, secrets_of_command

DESCRIPTION = "Train a LoRA adapter of a diffusers pipeline on a reward."
_CONFIG_HELP = "YAML file with the same flat names as the flags below; flags win over it wherever they stand."


def load_config(argv: Sequence[str], prog: str | None = None) -> Config:
    """Reads flags and, with `--config FILE`, a YAML file of the same flat names; flags win. `--help` prints and exits.

    Args:
        argv: the command line without the program's name.
        prog: the program's name in `--help`; None takes it from `sys.argv`.

    Raises:
        ConfigError: unknown name, wrong type, number out of range, or a combination that cannot be run.
    """
    return config_from_dict(load_values(argv, prog))


def load_values(
    argv: Sequence[str],
    prog: str | None = None,
    names: Collection[str] | None = None,
    description: str = DESCRIPTION,
    otherwise: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The typed values of flags and file by name, without the check of a whole configuration.

    Args:
        argv: the command line without the program's name.
        prog: the program's name in `--help`; None takes it from `sys.argv`.
        names: the only names that matter to the program: of a file the others are passed over, as flags they are
            refused, and `--help` does not show them. None for all.
        description: of the program in `--help`.
        otherwise: typed values in the place of a file, where `argv` names none.

    Returns:
        A value for every one of the names; None for one that is required and not given.

    Raises:
        ConfigError: unknown name or wrong type.
    """
    refuse_empty(argv)
    path, words = _split_config_file(argv)
    flags = [word[2:].split("=")[0] for word in words if _is_flag(word)]
    check_names(iter(flags), "command line")
    known = [name for name in knobs() if names is None or name in names]
    for flag in flags:
        if flag not in known:
            raise ConfigError(f"command line: --{flag} matters to training only; leave it out.")
    words = _strict_words(words)
    parser = _build_parser(prog, known, description)
    from_file = dict(otherwise or {}) if path is None else _read_config_file(parser, path, known)
    try:
        values = vars(parser.parse_args(words))
    except argparse.ArgumentError as error:
        raise ConfigError(redacted(explain(str(error), {}), secrets_of_command(argv))) from None
    for name in _list_knobs(known):
        if values[name] in ([None], ["null"]):  # `--ho_window null` takes back what a file says
            values[name] = None
    values.update({name: value for name, value in from_file.items() if name not in flags})
    return {name: values[name] for name in known}


def read_config(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The typed values that a YAML file gives to these names; what else it holds is passed over.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown name or a wrong type.
    """
    return _read_config_file(_build_parser(None, names, DESCRIPTION), path, names)


def load_config_or_exit(argv: Sequence[str], prog: str | None = None) -> Config:
    """`load_config` for scripts: an error becomes one line on stderr and exit code 2, without a traceback."""
    try:
        return load_config(argv, prog)
    except ConfigError as error:
        exit_with(error)


def exit_with(error: ConfigError) -> NoReturn:
    """Prints the error for a person and leaves with exit code 2."""
    say(f"error: {error}", sys.stderr)
    raise SystemExit(2)


def refuse_empty(words: Sequence[str]) -> None:
    """Raises ConfigError for a flag, or a word of its own, that is there but empty; only prompts may be so."""
    flag: str | None = None
    for word in words:
        value = word
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            value = value if equals else flag
        name = (flag or "").removeprefix("--")
        if not value.strip() and name not in MAY_BE_EMPTY:
            where = f"{name}: expected a text" if flag else "expected a name or a path"
            raise ConfigError(f"{where}, got an empty one; fill it or leave {'the flag' if flag else 'it'} out.")


def parse_or_exit(parser: Any, words: Sequence[str]) -> Any:
    """What argparse or jsonargparse reads of a command's words; an error is one line on stderr and exit code 2."""
    parser.error = lambda message, *_: exit_with(
        ConfigError(f"{redacted(' '.join(str(message).split()), secrets_of_command(words))}; see {parser.prog} --help.")
    )
    try:
        refuse_empty(words)
    except ConfigError as error:
        exit_with(error)
    return parser.parse_args(list(words))


def _is_flag(word: str) -> bool:
    return word.startswith("--") and word not in ("--", "--help")


def _split_config_file(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Takes `--config FILE` out of the command line, so that the order of file and flags cannot matter."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    try:
        found, rest = finder.parse_known_args(list(argv))
    except argparse.ArgumentError:
        raise ConfigError("--config: expected the path of a YAML file, got nothing.") from None
    if len(found.config) > 1:
        raise ConfigError(f"--config: expected one file, got {' and '.join(found.config)}; merge them into one.")
    return (Path(found.config[0]) if found.config else None), rest


def _strict_words(words: list[str]) -> list[str]:
    """The words, after a look at their values; mappings become JSON, which nobody reads in two ways.

    Raises:
        ConfigError: a number or truth value that some readers would take for another, or no YAML.
    """
    name, strict = "", []
    for word in words:
        start, value = "", word
        if _is_flag(word):
            name, sign, value = word[2:].partition("=")
            start = f"--{name}{sign}"
            if not sign:
                strict.append(word)
                continue
        if name in knobs():
            if takes_mapping(knobs()[name]) and value.lstrip().startswith("{"):
                value = json.dumps(_mapping(name, value))
            else:
                clear_value(knobs()[name], value, "")
        strict.append(start + value)
    return strict


def _mapping(name: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except PlainFileError as error:
        raise ConfigError(f"{name}: {error}.") from error
    return clear_value(knobs()[name], value, "")


def _build_parser(prog: str | None, names: Collection[str], description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--name VALUE ...]",
        description=description,
        formatter_class=argparse.HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=str, metavar="FILE", help=_CONFIG_HELP)
    groups: dict[str, Any] = {}
    for knob in (knobs()[name] for name in names):
        if knob.group not in groups:
            groups[knob.group] = parser.add_argument_group(knob.group_title)
        options: dict[str, Any] = {"type": knob.type, "help": help_text(knob), "metavar": placeholder(knob)}
        options["default"] = None if knob.required else knob.field.default
        element = element_type(knob)
        if element is not None:
            options.update(type=element if element is str else element | None, nargs="+")
        elif knob.type is bool:
            options.update(nargs="?", const=True, metavar="true|false")
        groups[knob.group].add_argument(f"--{knob.name}", **options)
    return parser


def _read_config_file(parser: ArgumentParser, path: Path, names: Collection[str]) -> dict[str, Any]:
    """The typed values of the YAML file; a single value of a list knob stands for a list of one."""
    values = {
        name: clear_value(knobs()[name], value, f"--config {path}: ")
        for name, value in read_yaml(path).items()
        if name in names
    }
    for name in _list_knobs(names):
        if values.get(name) is not None and not isinstance(values[name], list):
            values[name] = [values[name]]
    for name, value in values.items():
        # jsonargparse lets null pass for every type.
        if value is None and not knobs()[name].optional:
            expected = type_in_words(knobs()[name])
            raise ConfigError(f"--config {path}: {name}: expected {expected}, got null; give a value.")
    try:
        typed = vars(parser.parse_object(values))
    except argparse.ArgumentError as error:
        raise ConfigError(f"--config {path}: {explain(str(error), values)}") from None
    # jsonargparse reads a text such as `~` or `#` as YAML once more; what the file says as text stays as it is.
    return {name: values[name] if takes_text(knobs()[name], values[name]) else typed[name] for name in values}


def _list_knobs(names: Collection[str]) -> list[str]:
    return [name for name in names if element_type(knobs()[name]) is not None]
