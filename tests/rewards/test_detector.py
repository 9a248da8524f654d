"""Objects, their number, colours and places: the rules on known boxes, and the networks on tiny checkpoints."""

from typing import Any

import pytest
import torch

from benchmarks.large_parity import detector_parity
from benchmarks.reward_checkpoints import Sizes, write_clip, write_owl
from benchmarks.reward_parity import mixed_images, to_tensor
from rlr_peft.errors import RewardError
from rlr_peft.rewards import ModelFiles, ModelSettings, RewardSettings, load_reward, measure_images
from rlr_peft.rewards.detector import COLORS, THRESHOLD, fulfilled, lies, overlap, read_requirements
from rlr_peft.rewards.model_files import OPENAI_CLIP, OWLV2

LEFT, RIGHT, LOW = (0.0, 0.0, 10.0, 10.0), (40.0, 0.0, 50.0, 10.0), (0.0, 40.0, 10.0, 50.0)


def verdict(objects: dict[str, Any], include: list[dict[str, Any]], exclude: Any = None) -> list[bool]:
    """With every object red but those on the right."""
    required = read_requirements({"include": include, "exclude": exclude}, "sample 0")
    return list(fulfilled(objects, *required, lambda name, box: "blue" if box == RIGHT else "red"))


@pytest.mark.parametrize(
    ("objects", "include", "exclude", "expected"),
    [
        ({"bench": [LEFT]}, [{"class": "bench", "count": 1}], None, [True]),
        ({}, [{"class": "bench", "count": 1}], None, [False]),
        ({"bowl": [LEFT, LOW]}, [{"class": "bowl", "count": 2}], [{"class": "bowl", "count": 3}], [True, True]),
        (
            {"bowl": [LEFT, LOW, RIGHT]},
            [{"class": "bowl", "count": 2}],
            [{"class": "bowl", "count": 3}],
            [True, False],
        ),
        ({"car": [LEFT]}, [{"class": "car", "count": 1, "color": "red"}], None, [True, True]),
        ({"car": [RIGHT]}, [{"class": "car", "count": 1, "color": "red"}], None, [True, False]),
        ({}, [{"class": "car", "count": 1, "color": "red"}], None, [False, False]),
        (
            {"dog": [LEFT], "cat": [RIGHT]},
            [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}],
            None,
            [True, True, True],
        ),
        (
            {"dog": [LEFT], "cat": [LOW]},
            [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}],
            None,
            [True, True, False],
        ),
        ({"cat": [LOW]}, [{"class": "dog"}, {"class": "cat", "position": ["below", 0]}], None, [False, True, False]),
    ],
)
def test_clauses(objects: Any, include: Any, exclude: Any, expected: list[bool]) -> None:
    assert verdict(objects, include, exclude) == expected


def test_places_and_overlaps_of_known_boxes() -> None:
    assert lies(RIGHT, "right of", LEFT) and lies(LEFT, "left of", RIGHT) and lies(LOW, "below", LEFT)
    assert not lies(RIGHT, "below", LEFT) and not lies(LEFT, "left of", LEFT)
    # A tenth of the sum of both sides is no place of its own.
    assert not lies((1.9, 0, 11.9, 10), "right of", LEFT) and lies((30, 0, 40, 10), "right of", LEFT)
    assert overlap(LEFT, LEFT) == 1 and overlap(LEFT, RIGHT) == 0
    assert overlap(LEFT, (5.0, 0.0, 15.0, 10.0)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"include": []},
        {"include": [{"count": 1}]},
        {"include": ["dog"]},
        {"include": [{"class": "dog", "color": "mauve"}]},
        {"include": [{"class": "dog", "position": ["left of", 0]}]},
        {"include": [{"class": "dog"}, {"class": "cat", "position": ["near", 0]}]},
    ],
    ids=str,
)
def test_metadata_of_another_shape_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"expected `include` in the metadata.*for sample 0"):
        read_requirements(entry, "sample 0")


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("detector")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_clip(folder / "clip", Sizes())
        write_owl(folder / "owl")
    files = ModelFiles({OWLV2: str(folder / "owl"), OPENAI_CLIP: str(folder / "clip")})
    return load_reward("detector", RewardSettings(ModelSettings(files=files)))


def test_places_and_colors_are_the_published_ones(tmp_path: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        parity = detector_parity(tmp_path)
    assert parity["network"] < 1e-3 and parity["whole"] < 0.05 * parity["spread"]


def test_boxes_are_the_published_ones_less_those_that_overlap(reward: Any) -> None:
    picture = mixed_images((60, 90), 1)[0]
    found = reward.find(to_tensor([picture])[0], ["cat", "dog", "cat"])
    inputs = reward._processor(text=[["a photo of a cat", "a photo of a dog"]], images=picture, return_tensors="pt")
    (published,) = reward._processor.post_process_grounded_object_detection(
        reward.network["detector"](**inputs), threshold=THRESHOLD, target_sizes=[(60, 90)], text_labels=[["cat", "dog"]]
    )
    assert set(found) == {"cat", "dog"} and sum(map(len, found.values())) > 0
    best = published["scores"].argmax()
    assert found[published["text_labels"][best]][0] == pytest.approx(tuple(published["boxes"][best].tolist()))
    for boxes in found.values():
        assert {tuple(box) for box in boxes} <= {tuple(box) for box in published["boxes"].tolist()}
        assert all(overlap(box, other) <= 0.5 for i, box in enumerate(boxes) for other in boxes[:i])


def test_scores_are_shares_of_clauses(reward: Any) -> None:
    images = to_tensor(mixed_images((60, 90), 2)).requires_grad_(True)
    names = [name for name, boxes in reward.find(images[0].detach(), ["cat", "dog"]).items() if boxes]
    metadata = [
        {"include": [{"class": names[0], "count": 1}], "tag": "single_object"},
        {"include": [{"class": "dog", "count": 99}, {"class": "cat", "count": 99, "color": "red"}], "exclude": None},
    ]
    measured = measure_images(reward, images, ["one", "many"], metadata)
    assert measured.scores.tolist() == [1, 0] and measured.info["correct"].tolist() == [1, 0]
    assert reward.differentiable is False and not measured.scores.requires_grad
    with pytest.raises(RewardError, match="expected `include` in the metadata"):
        reward.check_prompts(["one"], [{}])


def test_a_color_is_the_likeliest_text_of_the_box(reward: Any) -> None:
    image = to_tensor(mixed_images((60, 90), 1))[0]
    color = reward.color(image, "cat", (20.0, 10.0, 70.0, 50.0))
    assert color in COLORS and color == reward.color(image[:, 10:50, 20:70], "cat", (0.0, 0.0, 50.0, 40.0))
    assert reward.color(image, "cat", (-5.0, -5.0, 0.4, 0.4)) in COLORS  # of a box at the edge
