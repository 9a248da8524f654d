"""What the commands with flags of their own share: these flags, then those of training; and places to write to."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rlr_peft.config import ConfigError
from rlr_peft.config.parsing import exit_with, refuse_empty
from rlr_peft.foreign_text import say


def own_parser(prog: str, usage: str, description: str) -> argparse.ArgumentParser:
    """A parser of a command's own flags, to which they are added; see `own_flags`."""
    return argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s {usage}",
        description=description,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )


def own_flags(
    parser: argparse.ArgumentParser, words: Sequence[str], others: str, show_others: Callable[[], object]
) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the words that are left for the config.

    A wrong flag prints one line and leaves with exit code 2; `--help` prints both kinds of flags and leaves with 0.

    Args:
        parser: of the command's own flags.
        words: the command line.
        others: a sentence before the help of all other flags.
        show_others: prints the help of all other flags and leaves.
    """
    if {"--help", "-h"} & set(words):
        say(parser.format_help())
        say(f"{others}\n")
        show_others()
    try:
        refuse_empty(words)
        return parser.parse_known_args(list(words))
    except ConfigError as error:
        exit_with(error)
    except argparse.ArgumentError as error:
        exit_with(ConfigError(f"{error.argument_name}: {error.message}; see {parser.prog} --help."))


def check_folder_or_exit(flag: str, folder: Path) -> None:
    """Where the folder can be neither written to nor made, one line on stderr and exit code 2; nothing is made yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return
    reason = "cannot be written to" if existing.is_dir() else "is a file"
    exit_with(
        ConfigError(
            f"{flag}: expected a place that can be written to, got {folder}, where {existing} {reason}; choose another."
        )
    )
