"""Numbers and lists as they appear in texts and tables."""

import math
from collections.abc import Sequence

from rlr_peft.estimators.base import step_ranges


def short_number(value: float) -> str:
    """Three digits: ``0.127``, ``4.41``, ``10,370``, ``3.2e-05``."""
    if not math.isfinite(value):
        return "infinite" if value > 0 else "undefined"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def with_error(value: float, error: float) -> str:
    """``0.127 ± 0.034``: two digits of the error and the value to the same place."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return short_number(value)
    if not 1e-3 <= max(abs(value), error) < 1e6:
        return f"{value:.1e} ± {error:.0e}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def listed(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def quoted(name: str) -> str:
    """Names of methods hold commas, so they are quoted inside sentences."""
    return f'"{name}"'


def steps_in_words(steps: Sequence[int]) -> str:
    """``step 2`` or ``steps 2-4, 7``."""
    return f"{'step' if len(steps) == 1 else 'steps'} {step_ranges(list(steps))}"
