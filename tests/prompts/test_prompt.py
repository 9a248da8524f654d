"""A prompt has a text, and carries the rest through lists, pickles and copies."""

import copy
import dataclasses
import pickle

import pytest

from rlr_peft.prompt import Prompt, as_prompts, texts_of

FULL = Prompt("a red star", "ugly", ("a shape", "a star", "a striped star"), {"color": "red"})


def test_it_shows_its_text_and_is_all_that_it_carries() -> None:
    assert FULL.text == str(FULL) == "a red star" and f"{FULL}!" == "a red star!"
    assert not isinstance(FULL, str), "a text derived from it, as by strip, would lose the rest"
    assert Prompt("a red star") != FULL and dataclasses.replace(FULL, stages=()) != FULL
    assert len({FULL, Prompt("a red star"), Prompt("a red star")}) == 2


@pytest.mark.parametrize("copied", [pickle.loads(pickle.dumps(FULL)), copy.deepcopy(FULL), copy.copy(FULL)])
def test_copies_carry_everything(copied: Prompt) -> None:
    assert copied == FULL
    assert (copied.text, copied.negative_prompt, copied.stages, dict(copied.metadata)) == (
        "a red star",
        "ugly",
        ("a shape", "a star", "a striped star"),
        {"color": "red"},
    )


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot assign to field 'stages'"):
        FULL.stages = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        FULL.metadata["color"] = "blue"  # type: ignore[index]
    own = {"color": "red"}
    prompt = Prompt("a", metadata=own)
    own["color"] = "blue"
    assert prompt.metadata["color"] == FULL.metadata["color"] == "red"


def test_plain_texts_carry_nothing() -> None:
    plain, same = as_prompts(["a", FULL])
    assert (plain.stages, plain.negative_prompt, dict(plain.metadata)) == ((), None, {}) and same is FULL
    assert texts_of(["a", FULL]) == ["a", "a red star"]
    staged = dataclasses.replace(FULL, stages=("x", "y"))
    assert staged.stages == ("x", "y") and staged.negative_prompt == "ugly" and staged.metadata == {"color": "red"}
