"""A prompt is its text, and carries the rest through lists, pickles and copies."""

import copy
import pickle

import pytest

from rlr_peft.prompt import Prompt, metadata_of, negative_prompt_of, stages_of, with_stages

FULL = Prompt("a red star", "ugly", ("a shape", "a star", "a striped star"), {"color": "red"})


def test_it_is_its_text() -> None:
    assert FULL == "a red star" and {FULL: 1}["a red star"] == 1 and f"{FULL}!" == "a red star!"
    assert isinstance(FULL, str) and type(str(FULL)) is str


@pytest.mark.parametrize("copied", [pickle.loads(pickle.dumps(FULL)), copy.deepcopy(FULL), copy.copy(FULL)])
def test_copies_carry_everything(copied: Prompt) -> None:
    assert (copied, copied.negative_prompt, copied.stages, dict(copied.metadata)) == (
        "a red star",
        "ugly",
        ("a shape", "a star", "a striped star"),
        {"color": "red"},
    )


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="make a new Prompt to give it another stages"):
        FULL.stages = ()
    with pytest.raises(TypeError):
        FULL.metadata["color"] = "blue"  # type: ignore[index]
    own = metadata_of(FULL)
    own["color"] = "blue"
    assert FULL.metadata["color"] == "red"


def test_plain_texts_carry_nothing() -> None:
    assert (stages_of("a"), negative_prompt_of("a"), metadata_of("a")) == ((), None, {})
    staged = with_stages(FULL, ["x", "y"])
    assert staged.stages == ("x", "y") and staged.negative_prompt == "ugly" and staged.metadata == {"color": "red"}
    assert with_stages("a", ["x"]).stages == ("x",)
