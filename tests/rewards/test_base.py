"""Scores from user code: what passes, what is refused, and what the message says."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.rewards import Reward, Scored, check_scores, info_of, is_attached, score_images

PROMPTS = ["a red star", "a blue ring", "a green moon"]


class Brightness(Reward):
    """A differentiable reward; `after` lets a test spoil its scores."""

    name = "brightness"
    differentiable = True

    def __init__(self, after: Any = lambda scores: scores) -> None:
        self.after = after
        self.saw_gradient: bool | None = None

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        self.saw_gradient = images.requires_grad
        return Scored(self.after(images.mean(dim=(1, 2, 3))))


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        np.array([1.0, 2.0, 3.0]),
        np.array([1, 2, 3], dtype=np.int8),
        [1, 2.0, np.float32(3)],
        (1.0, 2.0, 3.0),
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)],
        [1.0, torch.tensor(2.0), 3.0],
        ([1.0, 2.0, 3.0], {"info": 1}),
        (np.array([1.0, 2.0, 3.0]), [{}, {}, {}]),
        (torch.tensor([1.0, 2.0, 3.0]), None),
    ],
    ids=lambda scores: type(scores).__name__,
)
def test_everything_that_means_three_numbers_becomes_float32(scores: Any) -> None:
    checked = check_scores("mine", scores, PROMPTS)
    assert checked.dtype == torch.float32
    assert checked.tolist() == [1.0, 2.0, 3.0]


def test_two_plain_scores_in_a_tuple_are_not_taken_for_scores_and_info() -> None:
    assert check_scores("mine", (0.25, 0.5), PROMPTS[:2]).tolist() == [0.25, 0.5]


def test_booleans_count_as_zero_and_one() -> None:
    assert check_scores("mine", [True, False, True], PROMPTS).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_score_that_is_not_finite_names_reward_sample_and_prompt(value: float) -> None:
    with pytest.raises(
        RewardError, match=r"'mine': expected finite.*1 of 3 samples: sample 1 \"a blue ring\""
    ) as caught:
        check_scores("mine", torch.tensor([0.0, value, 1.0], dtype=torch.float64), PROMPTS)
    assert "a red star" not in str(caught.value)
    assert "guard divisions" in str(caught.value)


def test_many_bad_samples_are_counted_rather_than_listed() -> None:
    with pytest.raises(RewardError, match=r"20 of 20 samples: sample 0 .*sample 3 .* and 16 more"):
        check_scores("mine", [float("nan")] * 20, ["x" * 500] * 20)


@pytest.mark.parametrize(
    ("scores", "advice"),
    [
        (torch.zeros(3, 1), "squeeze"),
        (torch.zeros(()), "do not average"),
        (torch.zeros(2), r"expected scores of shape \(3,\), got \(2,\)"),
        ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], r"got \(3, 2\)"),
        (0.5, "do not average"),
    ],
)
def test_wrong_shapes_are_refused_with_advice(scores: Any, advice: str) -> None:
    with pytest.raises(RewardError, match=advice) as caught:
        check_scores("mine", scores, PROMPTS)
    assert "a red star" in str(caught.value)


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(3, dtype=torch.complex64),
        ["good", "bad", "good"],
        [0.5, None, 0.5],
        None,
        {"scores": [1.0, 2.0, 3.0]},
        np.array(["a", "b", "c"]),
        [torch.zeros(1), torch.zeros(2), torch.zeros(1)],
        [[1.0], [2.0, 3.0], [4.0]],
        "0.5",
    ],
    ids=str,
)
def test_things_that_are_no_real_numbers_are_refused(scores: Any) -> None:
    with pytest.raises(RewardError, match="'mine'"):
        check_scores("mine", scores, PROMPTS)


@pytest.mark.parametrize("kind", ["sparse", "meta", "nested"])
def test_tensors_whose_numbers_cannot_be_read_as_they_are_are_refused_by_kind(kind: str) -> None:
    scores = {
        "sparse": torch.ones(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    }[kind]
    with pytest.raises(RewardError, match=f"got a {kind} one; return a dense tensor"):
        check_scores("mine", scores, PROMPTS)
    assert info_of(([1.0, 2.0, 3.0], {"a": scores}), 3) == {}


def test_an_object_that_raises_when_it_is_read_is_refused() -> None:
    class Rude:
        def __array__(self, *arguments: Any, **options: Any) -> Any:
            raise KeyError("gone")

    with pytest.raises(RewardError, match="expected a tensor, an array or a list of 3 numbers, got Rude"):
        check_scores("mine", Rude(), PROMPTS)
    assert info_of(([1.0, 2.0, 3.0], {"a": Rude()}), 3) == {}


def test_none_in_a_list_names_its_sample() -> None:
    with pytest.raises(RewardError, match='sample 1 "a blue ring"'):
        check_scores("mine", [0.5, None, 0.5], PROMPTS)


def test_gradient_survives_the_check_and_the_conversion() -> None:
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scores = check_scores("mine", list(images.mean(dim=(1, 2, 3))), PROMPTS, attached_to=images)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert torch.allclose(gradient, torch.full_like(gradient, 1 / 48))


@pytest.mark.parametrize("cut", [lambda s: s.detach(), lambda s: s.detach().numpy(), lambda s: s.tolist()])
def test_a_differentiable_reward_with_detached_scores_is_refused(cut: Any) -> None:
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    with pytest.raises(RewardError, match=r"'brightness' says it is differentiable.*differentiable = False"):
        score_images(Brightness(cut), images, PROMPTS)


def test_trainable_weights_of_the_reward_model_do_not_hide_detached_images() -> None:
    weight = torch.ones(3, requires_grad=True)
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    spoiled = Brightness(lambda scores: scores.detach() * weight)
    with pytest.raises(RewardError, match="carry no gradient"):
        score_images(spoiled, images, PROMPTS)
    assert is_attached(images.mean() * weight, images)


def test_attachment_is_found_for_images_inside_a_graph_and_through_checkpointing() -> None:
    latents = torch.rand(3, 3, 4, 4, requires_grad=True)
    images = latents.sigmoid()
    for use_reentrant in (True, False):
        scores = torch.utils.checkpoint.checkpoint(lambda x: x.mean(dim=(1, 2, 3)), images, use_reentrant=use_reentrant)
        assert is_attached(scores, images)
    assert not is_attached(latents.mean(dim=(1, 2, 3)), images)


def test_a_reward_without_gradient_sees_detached_images_and_gives_detached_scores() -> None:
    reward = Brightness()
    reward.differentiable = False
    scores = score_images(reward, torch.rand(3, 3, 4, 4, requires_grad=True), PROMPTS)
    assert reward.saw_gradient is False
    assert not scores.requires_grad


def test_no_gradient_is_asked_for_where_none_can_flow() -> None:
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not score_images(Brightness(), images, PROMPTS).requires_grad
    assert not score_images(Brightness(), images.detach(), PROMPTS).requires_grad


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 1, 4, 4), (3, 4, 4), (3, 3, 2, 4, 4)])
def test_images_that_do_not_fit_the_prompts_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RewardError, match=r"expected images of shape \(3, 3, height, width\)"):
        score_images(Brightness(), torch.zeros(shape), PROMPTS)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("differentiable", [True, False])
def test_images_that_are_none_are_refused_whatever_the_reward_would_say(value: float, differentiable: bool) -> None:
    constant = Brightness(lambda scores: torch.zeros(3) + 0 * scores.nan_to_num(0, 0, 0))
    constant.differentiable = differentiable
    images = torch.zeros(3, 3, 4, 4)
    images[1, 2, 0, 3] = value
    with pytest.raises(RewardError, match=r'expected finite images, got .* in 1 of 3: sample 1 "a blue ring"\. .*fp16'):
        score_images(constant, images.requires_grad_(), PROMPTS)


def test_metadata_must_match_the_prompts() -> None:
    with pytest.raises(RewardError, match="3 prompts but 2 metadata"):
        score_images(Brightness(), torch.zeros(3, 3, 4, 4), PROMPTS, [{}, {}])
