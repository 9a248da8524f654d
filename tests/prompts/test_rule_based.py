"""Rules: exact on tiny-shapes, a sort by words elsewhere."""

import pytest

from rlr_peft.prompts.rule_based import SCALES, decompose_by_rules
from rlr_peft.tiny_shapes import scenes


def test_captions_are_split_exactly_by_scale() -> None:
    for scene in scenes.scenes("test")[:200]:
        parts = [scenes.parse_caption(text) for text in decompose_by_rules(scene.caption())]
        for scale, found in zip(SCALES, parts, strict=True):
            assert set(found) == {name for name, of in scenes.SCALES.items() if of == scale}
        assert {name: value for found in parts for name, value in found.items()} == vars(scene)


def test_a_scale_without_attributes_gets_the_whole_caption() -> None:
    assert decompose_by_rules("a red star") == ("a red star", "a red star", "a red star")
    assert decompose_by_rules("a dotted star") == ("a dotted star", "a star", "a dotted shape")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "a corgi wearing a hat, on a beach at sunset, intricate fur, 8k",
            ("a corgi, on a beach, at sunset", "a corgi, wearing a hat", "a corgi, intricate fur, 8k"),
        ),
        ("a cat", ("a cat", "a cat", "a cat")),
        (
            "portrait of a woman, detailed skin",
            (*["portrait of a woman, detailed skin"] * 2, "portrait of a woman, detailed skin"),
        ),
    ],
)
def test_other_texts_keep_their_subject(prompt: str, expected: tuple[str, str, str]) -> None:
    assert decompose_by_rules(prompt) == expected
    assert all(text.startswith(prompt.split(",")[0].split(" wearing")[0]) for text in decompose_by_rules(prompt))
