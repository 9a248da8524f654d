"""From command line and YAML file to a checked Config. Flags win over the file, wherever they stand."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlr_peft.config.arguments import (
    MAY_BE_EMPTY,
    Config,
    check_names,
    config_from_dict,
    knobs,
    method_of,
    refuse_gone,
)
from rlr_peft.config.knob import ConfigError, Knob
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
    from_flags, from_file = _read(argv, prog, list(knobs()), DESCRIPTION, {})
    return config_from_dict({**from_file, **from_flags}, flags=from_flags)


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
        A value for every one of the names; None for one that is required and not given, and for what is left to the
        method of estimation.

    Raises:
        ConfigError: unknown name or wrong type.
    """
    known = [name for name in knobs() if names is None or name in names]
    from_flags, from_file = _read(argv, prog, known, description, otherwise or {})
    return {name: knobs()[name].default for name in known} | from_file | from_flags


def read_config(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The typed values that a YAML file gives to these names; what else it holds is passed over.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown name or a wrong type.
    """
    where = f"--config {path}: "
    written = read_yaml(path)
    refuse_gone(written, where)
    return {name: knobs()[name].read(value, where) for name, value in written.items() if name in names}


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
    """What argparse reads of a command's words; an error is one line on stderr and exit code 2."""
    parser.error = lambda message, *_: exit_with(
        ConfigError(f"{redacted(' '.join(str(message).split()), secrets_of_command(words))}; see {parser.prog} --help.")
    )
    try:
        refuse_empty(words)
    except ConfigError as error:
        exit_with(error)
    return parser.parse_args(list(words))


def _read(
    argv: Sequence[str], prog: str | None, names: list[str], description: str, otherwise: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The typed values of the flags, and those of the file."""
    refuse_empty(argv)
    flags = [word[2:].split("=")[0] for word in argv if word.startswith("--") and word not in ("--", "--help")]
    check_names((flag for flag in flags if flag != "config"), "command line")
    refuse_gone(dict.fromkeys(flags, "a flag"), "")
    for flag in flags:
        if flag not in ("config", *names):
            raise ConfigError(f"command line: --{flag} matters to training only; leave it out.")
    parser = _build_parser(prog, names, description)
    try:
        found, stray = parser.parse_known_args(list(argv))
        if stray:
            raise ConfigError(
                f"expected --name VALUE, got the stray {' '.join(stray)}; put quotes around a value that holds spaces."
            )
        written = vars(found)
        files = written.pop("config", [])
        from_flags = {name: _read_flag(knobs()[name], words) for name, words in written.items()}
    except argparse.ArgumentError as error:
        raise ConfigError(_nothing_given((error.argument_name or "").removeprefix("--"))) from None
    except ConfigError as error:
        raise ConfigError(redacted(str(error), secrets_of_command(argv))) from None
    if len(files) > 1:
        raise ConfigError(f"--config: expected one file, got {' and '.join(files)}; merge them into one.")
    from_file = read_config(Path(files[0]), names) if files else dict(otherwise)
    if "estimator" in from_flags:  # the defaults of another method are no wishes
        others = method_of(from_file).knobs()
        from_file = {n: v for n, v in from_file.items() if n not in others or v != others[n][1].default}
    return from_flags, from_file


def _read_flag(knob: Knob, given: str | list[str]) -> Any:
    if knob.takes_mapping and isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            return knob.read(parse_yaml(given))
        except PlainFileError as error:
            raise ConfigError(f"{knob.name}: {error}.") from error
    return knob.read(given)


def _nothing_given(name: str) -> str:
    if name == "config":
        return "--config: expected the path of a YAML file, got nothing."
    return (
        f"{name}: expected {knobs()[name].type_in_words()}, got nothing; write --{name} VALUE (--{name}=VALUE if it "
        "starts with -)."
    )


def _build_parser(prog: str | None, names: Collection[str], description: str) -> argparse.ArgumentParser:
    """Reads every value as text; `Knob.read` gives the types."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--name VALUE ...]",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", action="append", metavar="FILE", help=_CONFIG_HELP)
    groups: dict[str, Any] = {}
    for knob in (knobs()[name] for name in names):
        if knob.group not in groups:
            groups[knob.group] = parser.add_argument_group(knob.group_title)
        options: dict[str, Any] = {"help": knob.help, "metavar": knob.placeholder}
        if knob.element_type is not None:
            options["nargs"] = "+"
        elif bool in knob.options:
            options.update(nargs="?", const="true", metavar="true|false")
        groups[knob.group].add_argument(f"--{knob.name}", **options)
    return parser
