"""`rlr-peft config`: is this configuration fit to run, and what does it say in full?"""

from collections.abc import Sequence

from rlr_peft.config import config_to_yaml, load_config
from rlr_peft.foreign_text import say


def config_command(words: Sequence[str]) -> int:
    """Prints the resolved YAML of `--config FILE` and flags."""
    say(config_to_yaml(load_config(words, prog="rlr-peft config")).rstrip("\n"))
    return 0
