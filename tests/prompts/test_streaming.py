"""Streams are shuffled in windows, and every step's prompts are a function of the step alone."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlr_peft.prompt import PromptError
from rlr_peft.prompts import StreamingPromptSampler
from rlr_peft.prompts.sampler import CURSORS


class Stream:
    """Counts how often it was opened and how far it was read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.opened = 0
        self.read = 0

    def __call__(self) -> Iterator[str]:
        self.opened += 1
        for i in range(self.size):
            self.read += 1
            yield str(i)


@given(size=st.integers(1, 30), buffer=st.integers(1, 12), count=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_every_prompt_comes_once_per_epoch_and_near_its_place(size: int, buffer: int, count: int, seed: int) -> None:
    sampler = StreamingPromptSampler(Stream(size), seed, buffer)
    row: list[str] = []
    while len(row) < 3 * size:
        row += sampler.sample(len(row) // count, count)
    for epoch in range(3):
        part = row[epoch * size : (epoch + 1) * size]
        assert Counter(part) == Counter(map(str, range(size)))
        assert all(int(prompt) // buffer == place // buffer for place, prompt in enumerate(part))


@given(
    size=st.integers(1, 30),
    buffer=st.integers(1, 12),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    count=st.integers(1, 5),
    processes=st.integers(1, 3),
)
def test_a_step_depends_on_nothing_but_its_number(
    size: int, buffer: int, steps: list[int], count: int, processes: int
) -> None:
    used = StreamingPromptSampler(Stream(size), 5, buffer)
    for step in steps:
        fresh = StreamingPromptSampler(Stream(size), 5, buffer)
        parts = [used.sample(step, count, rank, processes) for rank in range(processes)]
        assert [prompt for part in parts for prompt in part] == fresh.sample(step, count * processes)


def test_reading_on_does_not_start_again() -> None:
    """Two readers at different places, as training and calibration are, keep a place each."""
    stream = Stream(1000)
    sampler = StreamingPromptSampler(stream, 0, 10)
    for step in range(50):
        sampler.sample(step, 4)
        sampler.sample(step, 16)
    assert stream.opened == CURSORS
    assert stream.read <= 200 + 800 + 20


def test_windows_and_epochs_are_shuffled_differently() -> None:
    sampler = StreamingPromptSampler(Stream(100), 0, 50)
    row = [sampler.sample(step, 50) for step in range(4)]
    orders = {tuple(int(prompt) % 50 for prompt in part) for part in row}
    assert len(orders) == 4 and tuple(range(50)) not in orders


def test_an_empty_stream() -> None:
    with pytest.raises(PromptError, match="holds no prompt"):
        StreamingPromptSampler(Stream(0), 0, 4).sample(0, 1)
