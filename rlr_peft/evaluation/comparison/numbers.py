"""Numbers as tables and pages show them."""

import math

from rlr_peft.evaluation.comparison.diversity import Estimate

UNKNOWN = "-"


def with_error(value: float, error: float, *, sign: bool = False) -> str:
    """`0.613 ± 0.012`: two digits of the standard error, and the value to the same place; the value alone without."""
    plus = "+" if sign else ""
    if not math.isfinite(error) or error <= 0:
        return f"{value:{plus}.4g}"
    if not 1e-5 < error < 1e6:
        return f"{value:{plus}.3g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{plus},.{decimals}f} ± {error:,.{decimals}f}"


def estimate_text(estimate: Estimate | None, *, sign: bool = False) -> str:
    """As `with_error`; a dash for None."""
    return UNKNOWN if estimate is None else with_error(estimate.value, estimate.error, sign=sign)
