"""`rlr-peft config`: what a training would run with, and the recipes that ship with the package."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlr_peft.config import config_to_yaml
from rlr_peft.config.arguments import knobs
from rlr_peft.config.knob import Group, knob
from rlr_peft.config.parsing import read_words
from rlr_peft.foreign_text import say
from rlr_peft.recipes import first_comment, recipes


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
        say("\n".join(f"{name:<{width}}  {first_comment(path)}" for name, path in recipes().items()))
    else:
        say(config_to_yaml(asked.config()).rstrip("\n"))
    return 0
