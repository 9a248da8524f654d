"""From command line and YAML file to a checked Config. Flags win over the file, wherever they stand.

All programs read their words here: the flags of training, and those that a command has of its own, which are knobs too.
`rlr-peft config` prints what comes of them.
"""

import argparse
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any, Generic, NoReturn, TypeVar

from rlr_peft.config.arguments import (
    MAY_BE_EMPTY,
    Config,
    check_group,
    check_names,
    config_from_dict,
    knobs,
    knobs_of,
    method_of,
    refuse_gone,
    refuse_missing,
)
from rlr_peft.config.files import config_to_yaml, read_config
from rlr_peft.config.knob import ConfigError, Group, Knob, knob
from rlr_peft.errors import nearest_path
from rlr_peft.files import PlainFileError, first_sentence, parse_yaml, recipes, why_no_place
from rlr_peft.foreign_text import listed, say
from rlr_peft.redaction import redacted, secrets_of_command

DESCRIPTION = "Train a LoRA adapter of a diffusers pipeline on a reward."
EXAMPLE = """--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --prompt_path simple-animals/train --evaluation_prompt_path simple-animals/test \\
    --reward_fn aesthetic --heldout_reward_fn pickscore \\
    --mixed_precision bf16 --output_dir outputs/aesthetic"""
MOST_USED = (
    *("pretrained_model_name_or_path", "prompt_path", "reward_fn", "heldout_reward_fn", "evaluation_prompt_path"),
    *("output_dir", "resume_from_checkpoint", "estimator", "num_inference_steps", "rank", "learning_rate"),
    *("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "mixed_precision"),
    "gradient_checkpointing",
)
"""What `--help` shows of training's flags, in this order; `--help-all` shows all."""
_MOST_USED_TITLE = "Most used options of training"
_ALL = "--help_all"  # `--help-all`, as it comes here
_CONFIG_HELP = (
    "YAML file with the same names as the flags, or the name of a recipe (`rlr-peft config --list`); flags win over it."
)
G = TypeVar("G", bound=Group)


@dataclass(frozen=True)
class Words(Generic[G]):
    """What a command line says.

    Attributes:
        own: the command's own flags.
        flags: the typed values of training's flags that are given, by name.
        names: those that the command knows.
        file: of `--config`.
    """

    own: G
    flags: dict[str, Any]
    names: Collection[str]
    file: Path | None

    def values(self, otherwise: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The typed values of training's flags, of the file where no flag says otherwise, and of neither's defaults.

        Args:
            otherwise: typed values in the place of a file, where none is given.

        Raises:
            ConfigError: the file cannot be read, or holds an unknown name or a wrong type.
        """
        from_file = dict(otherwise or {}) if self.file is None else read_config(self.file, self.names)
        if "estimator" in self.flags:  # the defaults of another method are no wishes
            others = method_of(from_file).knobs()
            from_file = {n: v for n, v in from_file.items() if n not in others or v != others[n][1].default}
        return from_file | self.flags

    def config(self) -> Config:
        """The checked configuration of a run."""
        return config_from_dict(self.values(), flags=self.flags)


class NoFlags(Group):
    """A program without flags of its own."""


def load_config(argv: Sequence[str], prog: str | None = None) -> Config:
    """Reads flags and, with `--config FILE`, a YAML file of the same flat names; flags win. `--help` prints and exits.

    Args:
        argv: the command line without the program's name.
        prog: the program's name in `--help`; None takes it from `sys.argv`.

    Raises:
        ConfigError: unknown name, wrong type, number out of range, or a combination that cannot be run.
    """
    return read_words(argv, NoFlags, prog, DESCRIPTION, list(knobs()), example=EXAMPLE).config()


def check_output(path: Path, is_file: bool = False) -> None:
    """Raises ConfigError where a report's file, or its folder, can be neither written nor made; nothing is made yet."""
    if reason := why_no_place(path, is_file):
        raise ConfigError(f"output: expected a place to write to, got {path}, where {reason}; choose another.")


def exit_with(error: ConfigError) -> NoReturn:
    """Prints the error for a person and leaves with exit code 2."""
    say(f"error: {error}", sys.stderr)
    raise SystemExit(2)


def read_words(
    argv: Sequence[str],
    own: type[G],
    prog: str | None,
    description: str,
    names: Collection[str] = (),
    place: str | None = None,
    example: str = "",
) -> Words[G]:
    """The command line of a program; `--help` and `--help-all` print and exit.

    Args:
        argv: the command line without the program's name.
        own: the program's own flags; its docstring is their title in `--help`.
        prog: the program's name in `--help`; None takes it from `sys.argv`.
        description: of the program in `--help`.
        names: flags of training that it takes besides, and that `--config FILE` may give.
        place: which of its own values may stand alone, without its flag; of several values all.
        example: the words of a command line, for `--help`.

    Raises:
        ConfigError: unknown or missing name, wrong type, number out of range.
    """
    known = {**knobs_of(own), **{name: knobs()[name] for name in names}}
    argv = [_with_underscores(word) for word in argv]
    _refuse_empty(argv)
    flags = [word[2:].split("=")[0] for word in argv if word.startswith("--") and word not in ("--", "--help", _ALL)]
    _check_flags(flags, known, with_file=bool(names))
    parser = _build_parser(prog, own, known, description, place, example, shows_all=_ALL in argv)
    try:
        found, stray = parser.parse_known_args(["--help" if word == _ALL else word for word in argv])
        written = vars(found) | _placed(stray, place, known, vars(found))
        files = written.pop("config", [])
        typed = {name: _read_flag(known[name], words) for name, words in written.items()}
    except argparse.ArgumentError as error:
        raise ConfigError(_nothing_given((error.argument_name or "").removeprefix("--"), known)) from None
    except ConfigError as error:
        raise ConfigError(redacted(str(error), secrets_of_command(argv))) from None
    if len(files) > 1:
        raise ConfigError(f"--config: expected one file, got {' and '.join(files)}; merge them into one.")
    own_values = {name: typed.pop(name) for name in knobs_of(own) if name in typed}
    alone = f"; {place} also as a word of its own" if place and place not in own_values else ""
    refuse_missing(knobs_of(own), own_values, alone)
    group = own(**own_values)
    check_group(group)
    return Words(group, typed, names, _config_file(files[0]) if files else None)


def _placed(stray: list[str], place: str | None, known: Mapping[str, Knob], written: Collection[str]) -> dict[str, Any]:
    """What words without a flag say: the value of `place`, where no flag gives it."""
    if stray and place and place not in written and not any(word.startswith("-") for word in stray):
        if known[place].element_type is not None:
            return {place: stray}
        if len(stray) == 1:
            return {place: stray[0]}
        raise ConfigError(f"{place}: expected one, got {listed(stray)}; put quotes around one that holds spaces.")
    if stray:
        raise ConfigError(f"expected --name VALUE, got the stray {' '.join(stray)}; {_meant(stray[0], known)}.")
    return {}


def _meant(stray: str, known: Collection[str]) -> str:
    """What to write in place of a word that is neither a flag nor a value."""
    name = stray.lstrip("-").partition("=")[0].replace("-", "_")
    if stray in recipes() and set(MOST_USED) <= set(known):
        return f"write --config {stray} for the recipe"
    if stray == "help" or (stray.startswith("-") and name in known):
        return f"write --{name}"
    return "put quotes around a value that holds spaces"


def _config_file(place: str) -> Path:
    """The file itself, or the recipe of that name."""
    path = Path(place).expanduser()
    if os.path.isfile(path) or (place not in recipes() and os.path.lexists(path)):
        return path
    if place in recipes():
        return recipes()[place]
    file = nearest_path(place)
    is_near = file is not None and bool(path.suffix) and bool(get_close_matches(Path(file).stem, [path.stem]))
    near = [file] if file and is_near else get_close_matches(path.stem, recipes(), n=2)
    hint = f" Did you mean {listed(near, 'or')}?" if near else ""
    raise ConfigError(
        f"--config {place}: expected a YAML file or a recipe (`rlr-peft config --list`), got neither, seen from "
        f"{Path.cwd()}; correct it.{hint}"
    )


def _with_underscores(word: str) -> str:
    """`--learning-rate=1e-3` is `--learning_rate=1e-3`."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _refuse_empty(words: Sequence[str]) -> None:
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


def _check_flags(flags: Sequence[str], known: Mapping[str, Knob], with_file: bool) -> None:
    """Raises ConfigError for a flag that the program does not have."""
    for flag in flags:
        if flag in known or (flag == "config" and with_file):
            continue
        if with_file and flag in knobs():
            raise ConfigError(f"command line: --{flag} matters to training only; leave it out.")
        if with_file:
            refuse_gone({flag: "a flag"}, "")
        check_names([flag], "command line", known)


def _read_flag(knob: Knob, given: str | list[str]) -> Any:
    """Mappings and lists also as in YAML, `{a: 1}` and `[a, b]`; prompts may be in brackets themselves."""
    written = given
    if isinstance(given, list) and len(given) == 1 and knob.name not in MAY_BE_EMPTY:
        written = given[0].strip()
    is_mapping = knob.takes_mapping and isinstance(written, str) and written.lstrip().startswith("{")
    is_list = isinstance(given, list) and isinstance(written, str) and re.fullmatch(r"\[.*\]", written, re.DOTALL)
    if is_mapping or is_list:
        try:
            return knob.read(parse_yaml(str(written)))
        except PlainFileError as error:
            raise ConfigError(f"{knob.name}: {error}.") from error
    return knob.read(given)


def _nothing_given(name: str, known: Mapping[str, Knob]) -> str:
    if name == "config":
        return "--config: expected the path of a YAML file, got nothing."
    return (
        f"{name}: expected {known[name].type_in_words()}, got nothing; write --{name} VALUE (--{name}=VALUE if it "
        "starts with -)."
    )


class _Formatter(argparse.HelpFormatter):
    """Fills all texts but an example, whose lines are kept; words with a hyphen stay whole, as they may be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.splitlines() for line in wrap(part, width, break_on_hyphens=False)]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


def _usage(knob: Knob, stands_alone: bool) -> str:
    if not stands_alone:
        return f"--{knob.name} {knob.placeholder}"
    return knob.name.upper() if knob.element_type is None else f"{knob.name.upper()} [{knob.name.upper()} ...]"


def _build_parser(
    prog: str | None,
    own: type[Group],
    known: Mapping[str, Knob],
    description: str,
    place: str | None,
    example: str,
    shows_all: bool,
) -> argparse.ArgumentParser:
    """Reads every value as text; `Knob.read` gives the types."""
    own_names = knobs_of(own)
    required = [_usage(knob, knob.name == place) for knob in own_names.values() if knob.required]
    most_used = MOST_USED if set(MOST_USED) <= set(known) else ()
    shown = known if shows_all else {name: known[name] for name in (*own_names, *most_used)}
    takes_file = len(known) > len(own_names)
    required.sort(key=lambda word: word.startswith("-"))
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=" ".join(["%(prog)s", *required, *(["[--config FILE]"] if takes_file else []), "[--name VALUE ...]"]),
        description=description,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    if hidden := len(known) - len(shown):
        parser.add_argument("--help-all", action="help", help=f"Show {hidden} more options, by group, and exit.")
    if takes_file:
        parser.add_argument("--config", action="append", metavar="FILE", help=_CONFIG_HELP)
    groups: dict[str, Any] = {}
    for name, one in {**shown, **known}.items():
        title = one.group_title if shows_all or name in own_names else _MOST_USED_TITLE
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {"help": one.help if name in shown else argparse.SUPPRESS}
        options["metavar"] = one.placeholder
        if one.element_type is not None:
            options.update(nargs="+", action="extend")
        elif bool in one.options:
            options.update(nargs="?", const="true", metavar="true|false")
        groups[title].add_argument(f"--{name}", **options)
    if example:
        parser.epilog = f"example:\n  {parser.prog} {example}"
    return parser


@dataclass(frozen=True)
class ConfigFlags(Group):
    """The command"""

    list: bool = knob(False, "Name the recipes, for `--config NAME` of all commands, and stop.")


def config_command(words: Sequence[str]) -> int:
    """Prints the resolved YAML of `--config FILE` and flags, or the names of the recipes."""
    asked = read_words(
        words,
        ConfigFlags,
        "rlr-peft config",
        "Check a configuration of training and print it in full as YAML.",
        list(knobs()),
        example="--config sdxl --rank 16",
    )
    if asked.own.list:
        width = max(map(len, recipes()))
        say("\n".join(f"{name:<{width}}  {first_sentence(path)}" for name, path in recipes().items()))
    else:
        say(config_to_yaml(asked.config()).rstrip("\n"))
    return 0
