"""The validation split: unseen texts, the same for every seed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlr_peft.prompt import PromptError, as_prompts
from rlr_peft.prompts import hold_back, is_held_back


@given(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=40), st.floats(0.1, 99.9))
def test_no_text_is_on_both_sides(texts: list[str], percentage: float) -> None:
    prompts = as_prompts(texts)
    if len(set(prompts)) < 2:
        with pytest.raises(PromptError, match="at least 2 different prompts"):
            hold_back(prompts, percentage)
        return
    train, held = hold_back(prompts, percentage)
    assert sorted(map(str, train + held)) == sorted(texts)
    assert train and held and not set(train) & set(held)
    expected = min(max(1, round(len(set(prompts)) * percentage / 100)), len(set(prompts)) - 1)
    assert len(set(held)) == expected


def test_shares_and_order() -> None:
    prompts = as_prompts(f"prompt {i}" for i in range(1000))
    train, held = hold_back(prompts, 10)
    assert (
        len(held) == 100 and train == sorted(train, key=prompts.index) and hold_back(prompts[::-1], 10)[1] == held[::-1]
    )
    # Binomial(1000, .1): standard deviation 9.5
    streamed = sum(is_held_back(prompt, 10) for prompt in prompts)
    assert abs(streamed - 100) < 48
    assert all(is_held_back(prompt, 20) for prompt in prompts if is_held_back(prompt, 10))
