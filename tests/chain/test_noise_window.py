"""Where the noise lies from update to update."""

from collections import Counter

import pytest

from rlr_peft.build import derive_seed
from rlr_peft.config import MovingWindow


def test_a_sliding_window_goes_from_the_noise_to_the_clean_end_and_begins_again() -> None:
    window = MovingWindow(first=2, last=5, length=2, slide=3)
    places = [window.at(update, seed=7) for update in range(12)]
    assert places == [(4, 5)] * 3 + [(3, 4)] * 3 + [(2, 3)] * 3 + [(4, 5)] * 3


@pytest.mark.parametrize("slide", [None, 2])
def test_every_step_has_noise_as_often_as_the_coverage_says(slide: int | None) -> None:
    window, updates = MovingWindow(first=3, last=6, length=2, slide=slide), 3000
    seeds = [derive_seed(0, "noise_window", update) for update in range(updates)]
    places = [window.at(update, seed) for update, seed in enumerate(seeds)]
    assert set(Counter(places)) == {(3, 4), (4, 5), (5, 6)}
    assert window.shares() == {3: 1 / 3, 4: 2 / 3, 5: 2 / 3, 6: 1 / 3}
    for t, share in window.shares().items():
        measured = sum(first <= t <= last for first, last in places) / updates
        assert measured == pytest.approx(share, abs=0.03)
    assert len({window.at(0, seed) for seed in seeds}) == (3 if slide is None else 1), "a drawn one is drawn anew"
