"""Numbers as tables and pages show them."""

from rlr_peft.estimates import with_error
from rlr_peft.evaluation.comparison.diversity import Estimate

UNKNOWN = "-"


def estimate_text(estimate: Estimate | None, *, sign: bool = False) -> str:
    """As `with_error`; a dash for None."""
    return UNKNOWN if estimate is None else with_error(estimate.value, estimate.error, sign=sign)
