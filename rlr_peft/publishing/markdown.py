"""Texts of users inside Markdown: they are shown as they are, and end no table, tag or code block."""

import re

LONGEST = 300  # characters of a text inside a table
# As numbered entities these are never markup: what Markdown, HTML and the Hub's formulas are made of.
_ENTITIES = {ord(mark): f"&#{ord(mark)};" for mark in "&<>\\`*_[]~$"} | {ord("|"): "\\|"}


def in_cell(text: str) -> str:
    """The text in one line of Markdown; a very long one ends in dots."""
    line = one_line(text)
    return (line if len(line) <= LONGEST else f"{line[:LONGEST].rstrip()} \N{HORIZONTAL ELLIPSIS}").translate(_ENTITIES)


def in_code(text: str) -> str:
    """The text as a code span, also inside a table."""
    line = one_line(text).replace("|", "\\|")
    longest = max((len(row) for row in re.findall(r"`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"


def one_line(text: str) -> str:
    """The text with every row of blanks, and of line breaks of any kind, as one space."""
    return " ".join(text.split())


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any row of backticks inside."""
    longest = max((len(row) for row in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
