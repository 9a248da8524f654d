"""What the reports of all tools share: files without secrets, numbers as JSON, and tables for a console."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlr_peft.durable_files import replacing_file
from rlr_peft.foreign_text import one_line
from rlr_peft.redaction import redacted, redacted_values


def write_text(path: Path, text: str) -> Path:
    """Writes a text without secrets; returns its path."""
    with replacing_file(path) as aside:
        aside.write_text(redacted(text), encoding="utf-8")
    return path


def write_numbers(path: Path, values: Mapping[str, Any]) -> Path:
    """Writes plain values as JSON without secrets, null where a number is not finite; returns its path."""
    text = json.dumps(redacted_values(_finite(values)), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing_file(path) as aside:
        aside.write_text(f"{text}\n", encoding="utf-8")
    return path


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`, as people say it; below ten seconds with a decimal."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table: the first columns to the left, the others to the right; columns without a text are left out."""
    lines = [[one_line(cell) for cell in row] for row in rows]
    columns = [column for column in range(len(lines[0])) if any(line[column] for line in lines)]
    widths = {column: max(len(line[column]) for line in lines) for column in columns}
    return [
        "  ".join(
            line[column].ljust(width) if column < left else line[column].rjust(width)
            for column, width in widths.items()
        ).rstrip()
        for line in lines
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
