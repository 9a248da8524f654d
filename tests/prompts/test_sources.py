"""Prompts from files, and the stateless order of training."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlr_peft.prompt import PromptError, texts_of
from rlr_peft.prompts import MixedPromptSampler, PromptSampler, load_prompts
from rlr_peft.tiny_shapes import prompts as scene_prompts


def test_tiny_shapes_splits_do_not_overlap() -> None:
    train, test = load_prompts("tiny-shapes/train"), load_prompts("tiny-shapes/test")
    assert texts_of(train) == scene_prompts("train")
    assert not set(train) & set(test)
    assert load_prompts("tiny-shapes/test", 7) == test[:7]


def test_a_text_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein schöner Käfer\r\n\r\n  a cat\t\n   \n日本の猫\na cat".encode())
    assert texts_of(load_prompts(str(path))) == ["ein schöner Käfer", "a cat", "日本の猫", "a cat"]
    assert texts_of(load_prompts(str(path), 2)) == ["ein schöner Käfer", "a cat"]
    assert len(load_prompts(str(path), 100)) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no prompt"),
        ("blank.txt", b"\n \n\t\r\n", "holds no prompt"),
        ("latin.txt", "gr\u00fcn".encode("latin-1"), "line 1: expected UTF-8, got byte 0xfc at character 3"),
        ("table.xlsx", b"text\na cat\n", r"got a file ending in '\.xlsx'"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        load_prompts(str(tmp_path / name))
    assert name in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such file"):
        load_prompts(str(tmp_path / "absent.txt"))
    with pytest.raises(PromptError, match="got a folder"):
        load_prompts(str(tmp_path))
    with pytest.raises(PromptError, match="tiny-shapes/test"):
        load_prompts("tiny-shapes/validation")
    with pytest.raises(PromptError, match="max_samples = 0"):
        load_prompts("tiny-shapes/train", 0)


SIZES = st.integers(1, 40)


@given(size=SIZES, num_prompts=st.integers(1, 12), epochs=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_every_prompt_comes_once_per_epoch(size: int, num_prompts: int, epochs: int, seed: int) -> None:
    prompts = [str(index) for index in range(size)]
    sampler = PromptSampler(prompts, seed)
    row: list[str] = []
    while len(row) < epochs * size:
        row += sampler.sample(len(row) // num_prompts, num_prompts)
    for epoch in range(epochs):
        assert Counter(row[epoch * size : (epoch + 1) * size]) == Counter(prompts)


@given(size=SIZES, step=st.integers(0, 10_000), per_process=st.integers(1, 6), processes=st.integers(1, 5))
def test_processes_share_out_what_one_process_would_take(
    size: int, step: int, per_process: int, processes: int
) -> None:
    sampler = PromptSampler([str(index) for index in range(size)], seed=3)
    parts = [sampler.sample(step, per_process, rank, processes) for rank in range(processes)]
    together = [prompt for part in parts for prompt in part]
    assert together == sampler.sample(step, per_process * processes)
    first_epoch, last_epoch = step * len(together) // size, ((step + 1) * len(together) - 1) // size
    if first_epoch == last_epoch:
        assert len(set(together)) == len(together)


@given(size=SIZES, steps=st.lists(st.integers(0, 500), min_size=1, max_size=8), num_prompts=st.integers(1, 7))
def test_a_step_depends_on_nothing_but_its_number(size: int, steps: list[int], num_prompts: int) -> None:
    prompts = [str(index) for index in range(size)]
    used = PromptSampler(prompts, seed=5)
    for step in steps:
        fresh = PromptSampler(prompts, seed=5)
        assert used.sample(step, num_prompts) == fresh.sample(step, num_prompts)


def test_seeds_and_epochs_differ() -> None:
    prompts = [str(index) for index in range(50)]
    rows = {tuple(PromptSampler(prompts, seed).sample(epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(rows) == 25


def test_each_place_is_equally_likely() -> None:
    counts = Counter(PromptSampler(["a", "b", "c", "d"], seed).sample(0, 1)[0] for seed in range(4000))
    # Binomial(4000, 1/4): standard deviation 27; 5 of them.
    assert all(abs(count - 1000) < 137 for count in counts.values())


WEIGHTS = st.lists(st.sampled_from([0.1, 0.25, 1 / 3, 1.0, 2.0, 7.0]), min_size=2, max_size=4)


@given(weights=WEIGHTS, length=st.integers(1, 3000))
def test_sources_have_their_shares_at_every_moment(weights: list[float], length: int) -> None:
    sampler = MixedPromptSampler([[str(source)] for source in range(len(weights))], weights, seed=0)
    counts = Counter(sampler.sample(0, length))
    for source, weight in enumerate(weights):
        expected = length * weight / sum(weights)
        # Within the pattern a source is never more than its neighbours' turn away; shares are rounded to thousandths.
        assert abs(counts[str(source)] - expected) <= len(weights) + length / 1000


@given(weights=WEIGHTS, seed=st.integers(0, 99))
def test_each_source_is_dealt_out_as_if_it_were_alone(weights: list[float], seed: int) -> None:
    sources = [[f"{source}/{index}" for index in range(3 + 4 * source)] for source in range(len(weights))]
    row = MixedPromptSampler(sources, weights, seed).sample(0, 400)
    for source, prompts in enumerate(sources):
        own = [prompt for prompt in row if prompt.startswith(f"{source}/")]
        assert own == PromptSampler(prompts, seed).sample(0, len(own) or 1)[: len(own)]


@given(step=st.integers(0, 2000), per_process=st.integers(1, 6), processes=st.integers(1, 4))
def test_several_sources_are_a_function_of_the_step_for_any_number_of_processes(
    step: int, per_process: int, processes: int
) -> None:
    sources, weights = [[f"{letter}{index}" for index in range(7)] for letter in "abc"], [1.0, 0.7, 0.31]
    used = MixedPromptSampler(sources, weights, seed=3)
    parts = [used.sample(step, per_process, rank, processes) for rank in range(processes)]
    together = [prompt for part in parts for prompt in part]
    assert together == MixedPromptSampler(sources, weights, seed=3).sample(step, per_process * processes)


def test_shares_of_simple_fractions_are_exact_and_spread() -> None:
    letters = MixedPromptSampler([["a"], ["b"]], [3, 1], seed=0).sample(0, 12)
    assert letters == list("aaba") * 3
    thirds = Counter(MixedPromptSampler([["a"], ["b"], ["c"]], [1, 1, 1], seed=0).sample(0, 3000))
    assert set(thirds.values()) == {1000}
    with pytest.raises(PromptError, match="at least one prompt"):
        MixedPromptSampler([["a"], []], [1, 1], seed=0)


def test_arguments_out_of_range() -> None:
    with pytest.raises(PromptError, match="at least one prompt"):
        PromptSampler([], seed=0)
    sampler = PromptSampler(["a"], seed=0)
    for arguments in ((-1, 1, 0, 1), (0, 0, 0, 1), (0, 1, 1, 1), (0, 1, -1, 2)):
        with pytest.raises(ValueError, match="num_processes="):
            sampler.sample(*arguments)
