"""How names, steps and cosines are written."""

from collections.abc import Sequence

from rlr_peft.diagnose.estimates import Cosine
from rlr_peft.estimators.base import step_ranges


def quoted(name: str) -> str:
    """Names of methods hold commas, so they are quoted inside sentences."""
    return f'"{name}"'


def steps_in_words(steps: Sequence[int]) -> str:
    """``step 2`` or ``steps 2-4, 7``."""
    return f"{'step' if len(steps) == 1 else 'steps'} {step_ranges(list(steps))}"


def cosine_in_words(cosine: Cosine) -> str:
    """``0.97 [0.90, 1.00]``."""
    value, low, high = (f"{round(number, 2) + 0.0:.2f}" for number in (cosine.value, cosine.low, cosine.high))
    return f"{value} [{low}, {high}]"  # the sum turns -0 into 0
