"""What the reports of all tools share: files without secrets, tables for a console, and means with their errors."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlr_peft.files import replacing_file
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


def counted(number: int, noun: str) -> str:
    """`1 step`, `2 steps`; of nouns that take an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def last_steps(number: int) -> str:
    """`the last step`, `the last 3 steps`."""
    return "the last step" if number == 1 else f"the last {number} steps"


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


def half_width(error: float, count: int) -> float:
    """Half the width of the 95 % interval of a mean, by Student's distribution.

    Args:
        count: independent values that it was taken of, at least 2.
    """
    from scipy.special import stdtrit  # a third of a second, for which no `--help` waits

    return float(stdtrit(max(1, count - 1), 0.975)) * error


def direction(value: float, error: float, count: int) -> int:
    """1 or -1 where the 95 % interval of a mean lies above or below 0, else 0, also where the error is not known."""
    return int(math.copysign(1, value)) if abs(value) > half_width(error, count) else 0


def decimals_of(error: float) -> int:
    """Decimals that show two digits of a standard error; 4 where it is 0 or not known, 6 at the most."""
    if not math.isfinite(error) or error <= 0:
        return 4
    return min(6, max(0, 1 - math.floor(math.log10(error))))


def decimals_of_scores(scores: Iterable[float]) -> int:
    """Decimals that show three digits of the largest score, and of the others as much; 8 at the most."""
    largest = max(abs(score) for score in scores)
    return min(8, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 2


def with_error(value: float, error: float, *, sign: bool = False) -> str:
    """`0.613 ± 0.012`: two digits of the standard error, and the value to the same place; the value alone without."""
    plus = "+" if sign else ""
    if not math.isfinite(error) or error <= 0:
        return f"{value:{plus}.4g}"
    if not 1e-5 < error < 1e6:
        return f"{value:{plus}.3g} ± {error:.2g}"
    decimals = decimals_of(error)
    return f"{value:{plus},.{decimals}f} ± {error:,.{decimals}f}"


def gain_with_error(before: float, after: float, gain: float, error: float) -> str:
    """`+0.026 ± 0.018`; `less than 1e-06` where float32 scores of this size are not that exact."""
    least = 1e-6 * max(abs(before), abs(after))
    return f"less than {least:.0e}" if 0 < abs(gain) + error < least else with_error(gain, error, sign=True)


def short_number(value: float) -> str:
    """Three digits: ``0.127``, ``4.41``, ``10,370``, ``3.2e-05``."""
    if not math.isfinite(value):
        return "infinite" if value > 0 else "undefined"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"
