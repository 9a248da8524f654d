"""The shipped judges are accurate, bounded, differentiable and different."""

import pytest
import torch

from benchmarks.tiny_shapes.dataset import fresh_drawings
from rlr_peft.rewards import JUDGE_NAMES, JudgeName, create_judge, load_judge
from rlr_peft.tiny_shapes import ATTRIBUTES


@pytest.mark.parametrize("name", JUDGE_NAMES)
def test_fresh_drawings_of_unseen_scenes_are_read_well(name: JudgeName) -> None:
    images, labels = fresh_drawings(400, seed=77)
    with torch.no_grad():
        output = load_judge(name)(images)
    for column, attribute in enumerate(ATTRIBUTES):
        accuracy = (output[attribute].argmax(1) == labels[:, column]).double().mean()
        assert accuracy >= 0.97, f"{attribute}: {accuracy:.3f}"


@pytest.mark.parametrize("name", JUDGE_NAMES)
def test_outputs_are_log_probabilities(name: JudgeName) -> None:
    output = load_judge(name)(torch.rand(3, 3, 64, 64))
    assert list(output) == list(ATTRIBUTES)
    for attribute, values in ATTRIBUTES.items():
        assert output[attribute].shape == (3, len(values))
        assert (output[attribute] <= 0).all()
        assert torch.allclose(output[attribute].exp().sum(1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("name", JUDGE_NAMES)
def test_gradient_reaches_the_images_and_not_the_judge(name: JudgeName) -> None:
    judge = load_judge(name)
    assert not judge.training
    assert all(not parameter.requires_grad and parameter.dtype == torch.float32 for parameter in judge.parameters())
    judge = judge.double()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    judge(images)["shape"][0, 2].backward()
    assert images.grad is not None
    with torch.no_grad():
        step = 1e-5
        ahead, behind = (judge(images + sign * step * direction)["shape"][0, 2] for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert torch.allclose((images.grad * direction).sum(), expected, rtol=1e-5)


def test_other_sizes_are_resized() -> None:
    images, _ = fresh_drawings(32, seed=3)
    judge = load_judge("reward")
    large = torch.nn.functional.interpolate(images, scale_factor=4, mode="bilinear")
    with torch.no_grad():
        agreement = (judge(images)["shape"].argmax(1) == judge(large)["shape"].argmax(1)).double().mean()
    assert agreement > 0.9


def test_the_two_judges_are_built_differently() -> None:
    shapes = [sorted(tuple(value.shape) for value in create_judge(name).parameters()) for name in JUDGE_NAMES]
    assert shapes[0] != shapes[1]


def test_wrong_input_and_wrong_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        load_judge("reward")(torch.rand(3, 64, 64))
    with pytest.raises(ValueError, match="unknown judge"):
        load_judge("strict")  # type: ignore[arg-type]
