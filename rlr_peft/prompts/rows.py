"""From the rows of a table to prompts: which column is what, and which rows are none."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlr_peft.prompt import Prompt
from rlr_peft.prompts.errors import PromptError

logger = logging.getLogger(__name__)


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
        self._first_empty = 0
        self._has_reported = False

    def check_columns(self, names: list[str]) -> None:
        """Raises:
        PromptError: a column is missing; the message lists those that are there.
        """
        missing = [name for name in self._columns.all if name not in names]
        if missing:
            raise PromptError(
                f"prompts '{self._source}': no column {', '.join(missing)}; its columns are "
                f"{', '.join(names) or 'none'}. "
                "Name the right ones with --caption_column, --negative_prompt_column, --metadata_columns and "
                "--dcot_columns"
            )

    def read(self, row: Mapping[str, Any]) -> Prompt | None:
        """The prompt of the next row; None where its text is missing or blank.

        Raises:
            PromptError: a column is missing, or holds something else than text.
        """
        if not self._rows:
            self.check_columns(list(row))
        self._rows += 1
        columns = self._columns
        text = self._text(row, columns.caption)
        if not text:
            self._empty += 1
            self._first_empty = self._first_empty or self._rows
            return None
        stages = [self._text(row, name) for name in columns.stages]
        if not all(stages):
            name = columns.stages[stages.index("")]
            raise PromptError(
                f"prompts '{self._source}': expected a text in column {name} of row {self._rows}, got none"
            )
        negative = None if columns.negative_prompt is None else self._text(row, columns.negative_prompt)
        return Prompt(text, negative, stages, {name: row.get(name) for name in columns.metadata})

    def report(self) -> None:
        """Once all rows are read: warns, the first time, of those that were passed over.

        Raises:
            PromptError: there was no prompt at all.
        """
        if self._empty == self._rows:
            rows = f"its {self._rows} rows have" if self._rows else "it has"
            raise PromptError(f"prompts '{self._source}': {rows} no text in column {self._columns.caption}")
        if self._empty and not self._has_reported:
            logger.warning(
                "prompts '%s': %d of %d rows have no text in column %s and are left out, the first is row %d.",
                *(self._source, self._empty, self._rows, self._columns.caption, self._first_empty),
            )
        self._has_reported = True

    def _text(self, row: Mapping[str, Any], name: str) -> str:
        value = row.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise PromptError(
                f"prompts '{self._source}': expected text in column {name}, got {type(value).__name__} {value!r:.60} "
                f"in row {self._rows}; its columns are {', '.join(row)}"
            )
        return value.strip()
