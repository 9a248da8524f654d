"""From the rows of a table to prompts: which column is what, and which rows are none."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlr_peft.prompt import Prompt
from rlr_peft.prompts.errors import PromptError, in_words

logger = logging.getLogger(__name__)

FLAGS = "--caption_column, --negative_prompt_column, --metadata_columns and --dcot_columns"
# Rows by key may bring a column late, but one that this many rows lack is more likely misspelt.
MANY_ROWS = 1000
# What no text holds: signs of another encoding, of files glued together, or of damage.
NEVER_TEXT = re.compile("[\x00\ufeff\ufffe\uffff\ud800-\udfff]")
# Letters and symbols by their category, which draw nothing all the same: Hangul fillers and the empty Braille cell.
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"


@dataclass(frozen=True)
class Columns:
    """What the columns of a table hold.

    Attributes:
        caption: the prompts.
        negative_prompt: what guidance steers away from; an empty cell stands for nothing.
        stages: the stage prompts, noise first.
        metadata: passed on to rewards.
    """

    caption: str = "text"
    negative_prompt: str | None = None
    stages: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()

    @property
    def beyond_caption(self) -> tuple[str, ...]:
        """All columns that only a table has."""
        negative = () if self.negative_prompt is None else (self.negative_prompt,)
        return tuple(dict.fromkeys((*negative, *self.stages, *self.metadata)))

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that is read."""
        return tuple(dict.fromkeys((self.caption, *self.beyond_caption)))

    def check(self, where: str, names: Iterable[str]) -> None:
        """Raises:
        PromptError: a column is missing among the names; the message lists those that are there.
        """
        names = list(names)
        missing = [name for name in self.all if name not in names]
        if missing:
            raise _no_column(where, missing, names)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        values: of the columns that it has; a column that it lacks is absent, which is not the same as None.
        place: where it stands, for messages: a line or a row, with its file where there are several.
    """

    values: Mapping[str, Any]
    place: str


class RowReader:
    """Turns rows into prompts, passes over rows without a text, and says once how many there were.

    Args:
        source: the table in words, for messages.
        columns: what to read.
    """

    def __init__(self, source: str, columns: Columns) -> None:
        self._source = source
        self._columns = columns
        self._rows = 0
        self._empty = 0
        self._first_empty = ""
        self._has_reported = False
        self._not_seen = set(columns.all)
        self._names: dict[str, None] = {}

    def read(self, row: Row) -> Prompt | None:
        """The prompt of the next row; None where its text is missing or blank.

        Raises:
            PromptError: the first row has no caption, or a cell holds something else than text.
        """
        columns = self._columns
        if not self._rows and columns.caption not in row.values:
            columns.check(in_words(self._source, row.place), row.values)
        self._watch_columns(row.values)
        text = self._text(row, columns.caption)
        if not text:
            self._empty += 1
            self._first_empty = self._first_empty or row.place
            return None
        stages = [self._text(row, name) for name in columns.stages]
        if not all(stages):
            name = columns.stages[stages.index("")]
            raise PromptError(f"{in_words(self._source, row.place)}: expected a text in column {name}, got none")
        negative = None if columns.negative_prompt is None else self._text(row, columns.negative_prompt)
        metadata = {name: row.values[name] for name in columns.metadata if name in row.values}
        return Prompt(text, negative, stages, metadata)

    def report(self) -> None:
        """Once all rows are read: warns, the first time, of those that were passed over.

        Raises:
            PromptError: there was no prompt at all, or no row had one of the columns.
        """
        if self._empty == self._rows:
            rows = f"its {self._rows} rows have" if self._rows else "it has"
            raise PromptError(f"{in_words(self._source)}: {rows} no text in column {self._columns.caption}")
        if self._not_seen:
            raise _no_column(in_words(self._source), self._sorted_not_seen(), self._names)
        if self._empty and not self._has_reported:
            logger.warning(
                "%s: %d of %d rows have no text in column %s and are left out, the first is %s.",
                *(in_words(self._source), self._empty, self._rows, self._columns.caption, self._first_empty),
            )
        self._has_reported = True

    def _watch_columns(self, values: Mapping[str, Any]) -> None:
        self._rows += 1
        if self._rows <= MANY_ROWS:
            self._names.update(dict.fromkeys(values))
        if self._not_seen:
            self._not_seen -= values.keys()
        if self._not_seen and self._rows == MANY_ROWS:
            logger.warning(
                "%s: none of the first %d rows has a column %s; their columns are %s.",
                *(in_words(self._source), MANY_ROWS, ", ".join(self._sorted_not_seen()), ", ".join(self._names)),
            )

    def _sorted_not_seen(self) -> list[str]:
        return [name for name in self._columns.all if name in self._not_seen]

    def _text(self, row: Row, name: str) -> str:
        value = row.values.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise PromptError(
                f"{in_words(self._source, row.place)}: expected text in column {name}, got {type(value).__name__} "
                f"{value!r:.60}; its columns are {', '.join(row.values)}"
            )
        text = value.strip()
        problem = problem_of(text)
        if problem is not None:
            raise PromptError(f"{in_words(self._source, row.place)}: expected text in column {name}, got {problem}")
        return text


def problem_of(text: str) -> str | None:
    """What makes a text none that could be drawn, in words; None for a sound one, and for the empty one."""
    found = NEVER_TEXT.search(text)
    if found is not None:
        what = {
            "\x00": "a NUL, as in a file that is not UTF-8 but UTF-16",
            "\ufeff": "a byte order mark, as where files were joined",
        }.get(found.group(), "what is no character")
        return f"{what} (U+{ord(found.group()):04X} at character {found.start() + 1}); remove it, or save as UTF-8"
    if text and not any(map(_is_visible, text)):
        return f"invisible characters alone (U+{ord(text[0]):04X}); remove them"
    return None


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cn", "Mn", "Zl", "Zp", "Zs") and (
        character not in BLANK_LETTERS
    )


def _no_column(where: str, missing: Iterable[str], names: Iterable[str]) -> PromptError:
    return PromptError(
        f"{where}: no column {', '.join(missing)}; its columns are {', '.join(names) or 'none'}. "
        f"Name the right ones with {FLAGS}"
    )
