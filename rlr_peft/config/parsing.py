"""From command line and YAML file to a checked Config; jsonargparse does the typing."""

import argparse
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser

from rlr_peft.config.arguments import MAY_BE_EMPTY, Config, Knob, check_names, config_from_dict, knobs
from rlr_peft.config.knob import ConfigError
from rlr_peft.config.yaml_files import read_yaml
from rlr_peft.foreign_text import say
from rlr_peft.plain_files import AMBIGUOUS, MAX_DIGITS, YAML_VALUES, Ambiguous, PlainFileError, parse_yaml
from rlr_peft.redaction import HIDDEN, redacted, secrets_of_command

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


_NUMBER = re.compile("|".join(pattern for tag, pattern, _ in YAML_VALUES if tag in ("int", "float")))


def element_type(knob: Knob) -> type | None:
    """The type of a list knob's elements; None for a knob that is not a list."""
    for option in get_args(knob.type):
        if get_origin(option) is tuple:
            element: type = get_args(option)[0]
            return element
    return None


def takes_text(knob: Knob, value: Any) -> bool:
    """Whether the value is a text and the knob takes any text."""
    return isinstance(value, str) and str in _options(knob)


def takes_mapping(knob: Knob) -> bool:
    """Whether a mapping is a value of the knob."""
    return any(get_origin(option) is dict for option in _options(knob))


def clear_value(knob: Knob, value: Any, where: str) -> Any:
    """The value, in which no text stands for one number or truth value here and for another elsewhere (0x10, 010, yes).

    Args:
        knob: whose value it is.
        value: as typed, or as `parse_yaml` gives it.
        where: the file, for the message.

    Raises:
        ConfigError: the value or a part of it is such a text.
    """
    if isinstance(value, dict):
        return {name: _clear_part(knob, part, where) for name, part in value.items()}
    if isinstance(value, list):
        return [_clear_part(knob, part, where) for part in value]
    return _clear_part(knob, value, where)


def _clear_part(knob: Knob, part: Any, where: str) -> Any:
    if not isinstance(part, str) or part in _choices(knob):
        return str(part) if isinstance(part, str) else part
    unclear = AMBIGUOUS.fullmatch(part) is not None
    if _takes_number(knob) and len(part) > MAX_DIGITS and _NUMBER.fullmatch(part):
        advice = f"write a number of at most {MAX_DIGITS} digits"
    elif _takes_number(knob) and (unclear or (_is_a_number_to_python(part) and not _NUMBER.fullmatch(part))):
        advice = "write it in plain decimal digits"
    elif knob.type is bool and unclear:
        advice = "write true or false"
    elif isinstance(part, Ambiguous):
        advice = "put quotes around it, as other readers of YAML take it for no text"
    else:
        return part
    place = f"{part.place}: " if isinstance(part, Ambiguous) else ""
    raise ConfigError(f"{where}{place}{knob.name}: expected {type_in_words(knob)}, got {shortened(part)}; {advice}.")


def _choices(knob: Knob) -> set[str]:
    options = (*_options(knob), *get_args(element_type(knob)))
    return {str(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)}


def _takes_number(knob: Knob) -> bool:
    element = element_type(knob)
    options = {*_options(knob), element, *get_args(element)}
    options |= {type_ for option in options if get_origin(option) is dict for type_ in get_args(option)}
    # In a list of numbers and names, a name does not look like a number.
    return bool(options & {int, float})


def _is_a_number_to_python(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def shortened(text: str) -> str:
    """As much of a value as a message can show."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def placeholder(knob: Knob) -> str:
    """What `--help` shows as the value: the choices, or N (whole number), X (number), TEXT."""
    choices = [str(choice) for option in _options(knob) if get_origin(option) is Literal for choice in get_args(option)]
    if any(get_origin(option) is dict for option in _options(knob)):
        choices.append("{NAME: VALUE, ...}")
    for type_, word in ((int, "N"), (float, "X"), (str, "TEXT")):
        element = element_type(knob)
        if type_ in _options(knob) or element is type_ or type_ in get_args(element):
            choices.insert(0, word)
    return choices[0] if len(choices) == 1 else "{" + ",".join(choices) + "}"


def help_text(knob: Knob) -> str:
    """The knob's sentence, unit and default, as `--help` shows them."""
    unit = f" [{knob.field.metadata['unit']}]" if knob.field.metadata["unit"] else ""
    if knob.required:
        end = "(required)"
    else:
        default = knob.field.default
        end = f"(default: {'null' if default is None else str(default).lower() if knob.type is bool else default})"
    return f"{knob.field.metadata['sentence']}{unit} {end}".replace("%", "%%")


def type_in_words(knob: Knob) -> str:
    """The type of a knob: `a whole number or auto or null`."""
    element = element_type(knob)
    if element is not None:
        return {int: "whole numbers", float: "numbers", str: "one or more texts"}.get(
            element, "steps or names"
        ) + " or null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    words: list[str] = []
    for option in _options(knob):
        if get_origin(option) is dict:
            words.append(f"a mapping of names to {'numbers' if get_args(option)[1] is float else 'texts'}")
            continue
        words.extend(map(str, get_args(option)) if get_origin(option) is Literal else [names[option]])
    return " or ".join(words)


def explain(message: str, given: Mapping[str, Any]) -> str:
    """One plain line for an error message of jsonargparse; one of unknown form is passed on, joined to one line.

    Args:
        message: the text of the error.
        given: the values of the YAML file, empty for an error in the flags.
    """
    joined = " ".join(message.split())
    stray = re.fullmatch(r"[Uu]nrecognized arguments: (.*)", joined)
    if stray:
        return f"expected --name VALUE, got the stray {stray[1]}; put quotes around a value that holds spaces."
    named = re.search(r'(?:key "|argument --)(\w+)', joined)
    if named is None or named[1] not in knobs():
        return shortened(joined)
    name = named[1]
    expected = type_in_words(knobs()[name])
    if re.search(r"expected (one|at least one) argument", joined):
        return f"{name}: expected {expected}, got nothing; write --{name} VALUE (--{name}=VALUE if it starts with -)."
    value = re.search(r"(?:Got|Given) value: (.*)$", joined)
    got = shortened(repr(given[name]) if name in given else value[1] if value else joined)
    if knobs()[name].field.metadata["secret"]:
        got = HIDDEN
    got = {"None": "null", "True": "true", "False": "false"}.get(got, got)
    advice = f"write {name}: VALUE" if name in given else f"write --{name} VALUE"
    if name in given and "text" in expected and not isinstance(given[name], (dict, list)):
        advice = "put quotes around it"
    return f"{name}: expected {expected}, got {got}; {advice}."


def _options(knob: Knob) -> tuple[Any, ...]:
    is_union = get_origin(knob.type) not in (None, Literal, tuple)
    return get_args(knob.type) if is_union else (knob.type,)
