"""Rules: exact on tiny-shapes, a sort by words elsewhere."""

import pytest

from rlr_peft.prompts import SCALES, decompose_by_rules
from rlr_peft.tiny_shapes import ATTRIBUTES, parse_caption, scenes_of
from rlr_peft.tiny_shapes import SCALES as SCALE_OF


def test_every_stage_adds_exactly_the_attributes_of_its_scale() -> None:
    for scene in scenes_of("test")[:200]:
        told: set[str] = set()
        for scale, text in zip(SCALES, decompose_by_rules(scene.caption()), strict=True):
            told |= {name for name, of in SCALE_OF.items() if of == scale}
            assert parse_caption(text) == {name: getattr(scene, name) for name in ATTRIBUTES if name in told}
        assert text == scene.caption()


def test_a_stage_to_which_nothing_belongs_gets_the_whole_caption() -> None:
    assert decompose_by_rules("a red star") == ("a red star", "a red star", "a red star")
    assert decompose_by_rules("a dotted star") == ("a dotted star", "a star", "a dotted star")


@pytest.mark.parametrize(
    ("prompt", "coarse", "mid"),
    [
        (
            "a corgi wearing a hat, on a beach at sunset, intricate fur, 8k",
            "a corgi, on a beach, at sunset",
            "a corgi, wearing a hat, on a beach, at sunset",
        ),
        ("a cat", "a cat", "a cat"),
        ("portrait of a woman, detailed skin", *["portrait of a woman, detailed skin"] * 2),
        ("a boat, painting, red sails", "a boat, painting, red sails", "a boat, red sails"),
    ],
)
def test_other_texts_keep_their_subject(prompt: str, coarse: str, mid: str) -> None:
    assert decompose_by_rules(prompt) == (coarse, mid, prompt)
