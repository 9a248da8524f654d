"""The rest of a prompt, from which a contrast steers a stage away."""

import pytest

from rlr_peft.prompts import SCALES, decompose_by_rules, without_stage
from rlr_peft.tiny_shapes import ATTRIBUTES, parse_caption, scenes_of
from rlr_peft.tiny_shapes import SCALES as SCALE_OF


def test_of_a_caption_exactly_the_attributes_of_the_stage_are_missing() -> None:
    for scene in scenes_of("test")[:200]:
        stages = decompose_by_rules(scene.caption())
        for index, scale in enumerate(SCALES):
            rest = without_stage(scene.caption(), stages, index)
            assert rest is not None and parse_caption(rest) == {
                name: getattr(scene, name) for name in ATTRIBUTES if SCALE_OF[name] != scale
            }


@pytest.mark.parametrize(
    ("prompt", "stages", "expected"),
    [
        ("a dotted star", decompose_by_rules("a dotted star"), (None, "a dotted shape", "a star")),
        ("a red star", decompose_by_rules("a red star"), (None, None, None)),
        (
            "a corgi wearing a hat, on a beach, intricate fur",
            decompose_by_rules("a corgi wearing a hat, on a beach, intricate fur"),
            (
                "a corgi, wearing a hat, intricate fur",
                "a corgi, on a beach, intricate fur",
                "a corgi, wearing a hat, on a beach",
            ),
        ),
        ("a cat", decompose_by_rules("a cat"), (None, None, None)),
        (
            "a fox",
            ("a wide field", "a fox that runs", "red fur"),
            ("a fox that runs, red fur", "a wide field, red fur", "a wide field, a fox that runs"),
        ),
    ],
)
def test_of_other_texts_phrases_or_other_stages(
    prompt: str, stages: tuple[str, ...], expected: tuple[str | None, ...]
) -> None:
    assert tuple(without_stage(prompt, stages, index) for index in range(3)) == expected
