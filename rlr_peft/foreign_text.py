"""Texts of others (prompts, adapters, servers, the Hub, file names) on a terminal, in a log, in Markdown and on a page.

What `printable` makes visible could otherwise move a terminal's cursor, rewrite lines that stand there, hide words, or
turn the order of the letters around, so that people read another text than programs do.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rlr_peft.redaction import redacted

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

LONGEST = 300  # characters of a text inside a table
# Control characters but tab and line feed; marks and overrides of the writing direction; what has no width; other line
# ends; halves of a pair, which no file can hold. The two joiners stay: Persian and emoji are made with them.
_UNPRINTABLE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f\ud800-\udfff]"
)
# As numbered entities these are never markup: what Markdown, HTML and the Hub's formulas are made of.
_ENTITIES = {ord(mark): f"&#{ord(mark)};" for mark in "&<>\\`*_[]~$"} | {ord("|"): "\\|"}


def printable(text: str) -> str:
    r"""The text with every character that is not seen as itself written out, as Python does: `\x1b`, `\u202e`.

    Tabs and line feeds stay. Inside a Python string or a double-quoted YAML text the result means the same as before.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def printable_values(value: Any) -> Any:
    """The same of every text in plain values: lists, tuples and mappings, whose keys are texts."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_values(key): printable_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(printable_values(item) for item in value)
    return value


def say(text: object, to: TextIO | None = None) -> None:
    """Prints for a person, at once; on stdout unless told otherwise. The programs print by nothing else."""
    with without_bars(to):
        print(printable(str(text)), file=to, flush=True)


@contextmanager
def without_bars(to: TextIO | None) -> Iterator[None]:
    """Inside, no progress bar stands where something is printed to; those that there are come back below it."""
    bars = sys.modules.get("tqdm")  # who has not imported it has no bar
    if bars is None:
        yield
        return
    with bars.tqdm.external_write_mode(file=to):
        yield


class MessageHandler(logging.StreamHandler[TextIO]):
    """Messages of a program on stderr, never in the middle of a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with without_bars(self.stream):
            super().emit(record)


def say_traceback(error: BaseException) -> None:
    """Prints the traceback on stderr, printable and without secrets."""
    say(redacted("".join(traceback.format_exception(error)).rstrip("\n")), sys.stderr)


def guard_terminal() -> None:
    """From now on log messages of any library, warnings and tracebacks are printable too, and without secrets.

    Clients log the addresses that they ask, with what is secret in them.
    """
    logging.setLogRecordFactory(_SafeRecord)
    logging.captureWarnings(True)
    sys.excepthook = _say_uncaught


class _SafeRecord(logging.LogRecord):
    """What any logger of the process is told, libraries' own handlers included."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.exc_info:
            # Formatters take the text that is there in place of making their own.
            self.exc_text = printable(redacted("".join(traceback.format_exception(*self.exc_info)).rstrip("\n")))

    def getMessage(self) -> str:  # noqa: N802 (the library's name)
        return printable(redacted(super().getMessage()))


def _say_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say_traceback(error.with_traceback(trace))


def in_cell(text: str) -> str:
    """The text in one line of Markdown; a very long one ends in dots."""
    line = one_line(text)
    return (line if len(line) <= LONGEST else f"{line[:LONGEST].rstrip()} \N{HORIZONTAL ELLIPSIS}").translate(_ENTITIES)


def in_text(text: str) -> str:
    """The text in one line of Markdown that is no tag, link or image; emphasis and code stay."""
    return one_line(text).translate({ord(mark): f"&#{ord(mark)};" for mark in "&<["})


def in_code(text: str) -> str:
    """The text as a code span, also inside a table."""
    line = one_line(text).replace("|", "\\|")
    longest = max((len(row) for row in re.findall(r"`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"


def one_line(text: str) -> str:
    """The printable text with every row of blanks, and of line breaks of any kind, as one space."""
    return printable(" ".join(text.split()))


def shown_name(name: str) -> str:
    """A Hub id or a name as it is; of a path the last part alone, since a path tells of the machine."""
    return Path(name).resolve().name if Path(name).exists() else name


def listed(names: Iterable[str], last: str = "and") -> str:
    """``a, b and c``, of one name or more."""
    *others, end = names
    return f"{', '.join(others)} {last} {end}" if others else end


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any row of backticks inside."""
    longest = max((len(row) for row in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def page_environment(folder: Path) -> "Environment":
    """The Jinja templates of HTML pages in this folder: texts are printable and no markup, a missing value an error.

    Pages include `house.css`, which they share.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable_values(value),
    )


def inside_script(data: dict[str, Any]) -> "Markup":
    """JSON that no text can end a page's script element with."""
    from markupsafe import Markup

    text = json.dumps(printable_values(data), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
