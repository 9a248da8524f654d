"""Half-order blocks: how they tile the steps, and how often they are drawn."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlr_peft.estimators import HalfOrder, draw, draw_probabilities, expected_draws, free_blocks, tiles


@given(first=st.integers(1, 5), extent=st.integers(1, 30), length=st.integers(1, 8))
def test_tiles_partition_the_steps(first: int, extent: int, length: int) -> None:
    blocks = tiles(first, first + extent - 1, length)
    assert [t for block in blocks for t in block] == list(range(first, first + extent))
    assert all(len(block) == length for block in blocks[:-1])


def test_no_tile_starts_at_a_noiseless_step() -> None:
    assert tiles(1, 6, 4, noiseless=[1]) == [range(2, 6), range(6, 7)]
    assert tiles(1, 6, 2, noiseless=[1, 3]) == [range(2, 4), range(4, 6), range(6, 7)]


def test_free_blocks_start_anywhere_they_fit() -> None:
    assert free_blocks(2, 5, 3) == [range(2, 5), range(3, 6)]


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("start", ["uniform", "gradient-norm", "window"])
def test_blocks_are_drawn_as_often_as_their_weights_assume(start: str, num_draws: int) -> None:
    blocks = tiles(2, 9, 2)
    half_order = HalfOrder(2, num_draws, start, (4, 9) if start == "window" else None)
    probabilities = draw_probabilities(blocks, half_order, {2: 0.0, 4: 2.0, 6: 1.0}, defensive_share=0.1)
    assert probabilities.sum().item() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    trials = 4000
    counts = Counter(i for _ in range(trials) for i in draw(probabilities, num_draws, generator))
    for i, expectation in enumerate(expected_draws(probabilities, num_draws).tolist()):
        # Each count is a sum of `trials` draws with variance at most `num_draws`: 5 standard deviations.
        assert counts[i] / trials == pytest.approx(expectation, abs=5 * math.sqrt(num_draws / trials))


def test_softmax_of_gradient_norms_is_the_papers() -> None:
    blocks = free_blocks(2, 4, 1)
    probabilities = draw_probabilities(blocks, HalfOrder(1, 1, "gradient-norm"), {2: 0.5, 3: 1.5, 4: 0.0})
    expected = torch.tensor([0.5, 1.5, 0.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(probabilities, expected)
    unknown = draw_probabilities(blocks, HalfOrder(1, 1, "gradient-norm"), {2: 1.0})
    torch.testing.assert_close(unknown, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_window_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"starts within steps 8\.\.9"):
        draw_probabilities(tiles(2, 5, 2), HalfOrder(2, 1, "window", (8, 9)), {})
