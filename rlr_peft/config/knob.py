"""`knob`: a dataclass field that carries its own sentence, unit and range."""

from collections.abc import Mapping
from dataclasses import MISSING, field
from typing import Any, Literal

from rlr_peft.errors import UserError

Found = Literal["words", "model", "prompts", "dataset", "reward"]


class Table(dict[str, Any]):
    """A mapping inside a frozen config: it has a hash, and nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class ConfigError(UserError, ValueError):
    """The configuration cannot be run; the message says what was expected, what was got and what to do."""


def knob(
    default: Any,
    sentence: str,
    *,
    unit: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    secret: bool = False,
    found: Found | None = None,
) -> Any:
    """Declare one knob of a frozen arguments dataclass.

    Args:
        default: the default value; `MISSING` makes the knob required.
        sentence: one plain sentence, shown by `--help`.
        unit: what one of it is, shown by `--help` in brackets.
        at_least, above, at_most, below: the allowed range of a number.
        found: what of its texts is taken from a config that was merely found, see `found.py`; None for nothing.
            Numbers, true and false, and choices of fixed words always are.
        secret: never shown or written: null stands for it in `repr`, YAML, trackers and cards.
    """
    metadata: Mapping[str, Any] = {
        "sentence": sentence,
        "unit": unit,
        "secret": secret,
        "found": found,
        "bounds": {"at least": at_least, "above": above, "at most": at_most, "below": below},
    }
    if default is MISSING:
        return field(metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)
