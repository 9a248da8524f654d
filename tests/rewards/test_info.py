"""Numbers beside the scores."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlr_peft.rewards import info_means, info_of, join_info, load_reward, measure_images

SCORES = torch.zeros(3)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"a": torch.tensor([1.0, 2.0, 3.0])}, {"a": [1, 2, 3]}),
        ({"a": [1, 2.5, np.float32(3)]}, {"a": [1, 2.5, 3]}),
        ({"a": np.array([1, 2, 3])}, {"a": [1, 2, 3]}),
        ({"a": 0.5, "b": True}, {"a": [0.5] * 3, "b": [1.0] * 3}),
        ({"a": torch.ones(3, requires_grad=True) * 2}, {"a": [2, 2, 2]}),
        ([{"a": 1}, {"a": 2, "b": 5}, {"a": torch.tensor(3.0)}], {"a": [1, 2, 3], "b": [None, 5, None]}),
        ({"a": "text", "b": [1, 2], "c": ["x", "y", "z"], "d": None, "e": [[1], [2], [3]]}, {}),
        ([{}, {}], {}),
        (None, {}),
    ],
    ids=str,
)
def test_info_becomes_one_number_per_sample_and_the_rest_is_left_out(info: Any, expected: dict[str, list[Any]]) -> None:
    found = info_of((SCORES, info), 3)
    assert {name: [None if math.isnan(v) else v for v in values.tolist()] for name, values in found.items()} == expected
    assert not any(values.requires_grad for values in found.values())


def test_plain_scores_have_no_info() -> None:
    assert info_of(SCORES, 3) == {} and info_of((0.5, 0.25), 2) == {}


def test_parts_are_joined_and_averaged_though_names_are_missing_in_some() -> None:
    joined = join_info([({"a": torch.tensor([1.0, 2.0])}, 2), ({"b": torch.tensor([5.0])}, 1)])
    assert joined["a"][:2].tolist() == [1.0, 2.0] and joined["a"][2].isnan()
    assert info_means(joined | {"c": torch.tensor([math.inf, math.nan])}) == {"a": 1.5, "b": 5.0}


def test_a_users_info_arrives(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(images, prompts):\n    return images.mean((1, 2, 3)), {'red': images[:, 0].mean((1, 2))}\n"
    )
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    scored = measure_images(load_reward(f"{path}:mine"), images, ["a", "b", "c"])
    assert scored.scores.requires_grad
    assert torch.allclose(scored.info["red"], images.detach()[:, 0].mean((1, 2)))
