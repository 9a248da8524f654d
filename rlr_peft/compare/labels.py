"""What adapters, bases and files are called: short, different, and without a path of this machine."""

from collections.abc import Sequence
from pathlib import Path

from rlr_peft.config import ConfigError
from rlr_peft.foreign_text import one_line

BASE = "base"


def unique_labels(places: Sequence[str]) -> list[str]:
    """The last parts of paths or repositories, as many as it takes to tell them apart.

    Raises:
        ConfigError: one adapter twice.
    """
    parts = [Path(place).parts if Path(place).exists() else tuple(place.split("/")) for place in places]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"--adapter: expected different adapters, got {', '.join(places)}.")
    labels: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        labels = [one_line("/".join(part[-length:]).removesuffix(".safetensors")) for part in parts]
        if len({*labels, BASE}) == len(labels) + 1:
            return labels
    return [f"{label} ({index + 1})" for index, label in enumerate(labels)]


def shown_name(name: str) -> str:
    """A Hub id or a name as it is; of a path the last part alone."""
    return Path(name).resolve().name if Path(name).exists() else name


def file_name(label: str) -> str:
    """The label without what a file name cannot hold."""
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in label)[:60]
