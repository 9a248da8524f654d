"""Intervals against scipy's Student distribution, and what is claimed of a mean."""

import math

import pytest
from scipy import stats

from rlr_peft.reports import (
    decimals_of,
    decimals_of_scores,
    direction,
    gain_with_error,
    half_width,
    short_number,
    with_error,
)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 10, 11, 12, 16, 30, 64, 1000])
def test_intervals_are_students(count: int) -> None:
    assert half_width(0.5, count) == pytest.approx(0.5 * stats.t.ppf(0.975, count - 1), rel=1e-4)


def test_nothing_is_claimed_where_the_interval_holds_zero() -> None:
    assert direction(0.3, 0.1, 100) == 1 and direction(-0.3, 0.1, 100) == -1
    assert direction(0.3, 0.1, 3) == 0, "three prompts prove little"
    assert direction(0.0, 0.0, 10) == 0 and direction(0.1, 0.0, 10) == 1
    assert direction(0.3, math.nan, 10) == direction(math.nan, 0.1, 10) == 0


@pytest.mark.parametrize(
    ("scores", "decimals"),
    [([0.91, 0.0], 3), ([-5.2], 2), ([27.1], 1), ([300.0], 0), ([2e-4, 1e-4], 6), ([0.0], 2), ([1e-30], 8)],
)
def test_scores_have_three_digits(scores: list[float], decimals: int) -> None:
    assert decimals_of_scores(scores) == decimals


def test_digits_end_somewhere() -> None:
    assert decimals_of(3e-9) == 6 and decimals_of(0) == decimals_of(math.nan) == 4 and decimals_of(123.0) == 0
    assert with_error(0.1, 3e-9, sign=True) == "+0.1 ± 3e-09"
    assert gain_with_error(1.0, 1.0, -3.7e-9, 3.7e-9) == "less than 1e-06"
    assert gain_with_error(1e-9, 3e-9, 2e-9, 1e-10) == "+2e-09 ± 1e-10" and gain_with_error(1, 1, 0, 0) == "+0"


def test_numbers_in_words() -> None:
    assert [short_number(v) for v in (0.0, 0.12345, 4.4067, 10370.2, 3.2e-5, float("inf"))] == [
        "0",
        "0.123",
        "4.41",
        "10,370",
        "3.2e-05",
        "infinite",
    ]
    assert with_error(0.12661, 0.03381) == "0.127 ± 0.034"
    assert with_error(3e-7, 2e-8) == "3e-07 ± 2e-08"
