"""Stages: every step belongs to exactly one, noise first."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlr_peft.config import window_steps
from rlr_peft.prompt import Stages, make_stages


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(30, 200))
def test_stages_cut_the_chain_into_consecutive_parts(parts: list[int], num_steps: int) -> None:
    fractions = [part / sum(parts) for part in parts]
    stages = make_stages([f"s{i}" for i in range(len(parts))], fractions)
    assume(min(fractions) * num_steps >= 1)
    found = stages.steps(num_steps)
    assert list(itertools.chain(*found)) == list(range(num_steps, 0, -1))
    for steps, fraction in zip(found, fractions, strict=True):
        assert abs(len(steps) - fraction * num_steps) <= 1 + 1e-6
    for name, steps in zip(stages.names, found, strict=True):
        assert stages.window(name, num_steps) == (min(steps), max(steps))


def test_defaults() -> None:
    stages = make_stages()
    assert [len(steps) for steps in stages.steps(50)] == [17, 16, 17]
    assert stages.describe(50) == "coarse (steps 50-34), mid (33-18), fine (17-1)"
    assert make_stages(fractions=[0.5, 0.5]).names == ("stage-1", "stage-2")
    assert [len(steps) for steps in make_stages(fractions=[0.375, 0.25, 0.375]).steps(4)] == [2, 1, 1]
    assert make_stages(["one"]).steps(4) == (range(4, 0, -1),)


@pytest.mark.parametrize(
    ("names", "fractions", "message"),
    [
        (("a", "a"), (0.5, 0.5), "expected different names"),
        (("a", "b"), (1.0,), "one fraction for each of the stages a, b, got 1"),
        (("a", "b"), (0.5, 0.6), "sum to 1, got 0.5 0.6"),
        (("a", "b"), (0.0, 1.0), "fractions above 0"),
    ],
)
def test_what_does_not_fit(names: tuple[str, ...], fractions: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stages(names, fractions)


def test_windows_by_steps_and_by_names() -> None:
    stages = make_stages()
    assert window_steps((30, 40), 50, None) == (30, 40)
    assert window_steps(("fine",), 50, stages) == (1, 17)
    assert window_steps(("coarse", "mid"), 50, stages) == (18, 50)
    assert window_steps(("auto",), 50, stages) is None
