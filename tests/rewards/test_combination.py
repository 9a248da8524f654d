"""Several rewards as one: weights, scales, minimums, and what is only measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.rewards import (
    HeldoutRewards,
    Reward,
    RunningScale,
    Scored,
    Term,
    WeightedRewards,
    load_reward,
    measure_images,
    score_images,
)
from rlr_peft.rewards.combination import DECAY

PROMPTS = ["a", "b", "c"]


class Plain(Reward):
    """A reward from a function of images."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor], differentiable: bool = True) -> None:
        self.name, self.function, self.differentiable = name, function, differentiable

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        return Scored(self.function(images))


def red(images: Tensor) -> Tensor:
    return images[:, 0].mean((1, 2))


def green(images: Tensor) -> Tensor:
    return 1000 * images[:, 1].mean((1, 2))


def images(seed: int = 0, count: int = 3) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def pair(**values: Any) -> WeightedRewards:
    return WeightedRewards([Term(Plain("red", red), 1.0), Term(Plain("green", green), 0.5)], **values)


def seen(rewards: WeightedRewards, *seeds: int) -> WeightedRewards:
    """After observing batches of 64 images."""
    for seed in seeds:
        batch = images(seed, 64)
        rewards.learn({"red": red(batch), "green": green(batch)})
    return rewards


def test_without_scales_it_is_the_weighted_sum() -> None:
    scored = measure_images(pair(scaling="none"), images(), PROMPTS)
    assert torch.allclose(scored.scores, red(images()) + 0.5 * green(images()))
    assert torch.allclose(scored.raw["red"], red(images())) and torch.allclose(scored.raw["green"], green(images()))
    assert not scored.info and scored.logged == scored.raw
    assert torch.equal(pair(scaling="none").scores_on_first_scales(scored.scores, scored.raw), scored.scores)
    assert pair().name == "1 red + 0.5 green"


def test_scaled_rewards_count_by_their_weights_whatever_their_units() -> None:
    rewards = seen(pair(), 1)
    batch = images(2, 64)
    red_part, green_part = (red(batch) / rewards.scales()["red"], 0.5 * green(batch) / rewards.scales()["green"])
    assert torch.allclose(score_images(rewards, batch, ["x"] * 64), red_part + green_part, rtol=1e-4)
    assert float(red_part.std() / green_part.std()) == pytest.approx(2, rel=0.3), "weights 1 and 0.5"


def test_a_batch_is_never_divided_by_its_own_scale() -> None:
    """Scores do not depend on which other samples are in the batch, before or after they are observed by others."""
    rewards = seen(pair(), 1)
    alone = torch.cat([score_images(rewards, images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert torch.allclose(score_images(rewards, images(), PROMPTS), alone, rtol=1e-5)
    before = rewards.state_dict()
    measure_images(rewards, images(), PROMPTS)
    assert rewards.state_dict() == before, "scoring alone must not move the scales"


def test_the_scale_is_the_running_deviation_of_the_past() -> None:
    scale = RunningScale()
    assert scale.current == scale.first == 1
    scale.learn(torch.ones(20))
    assert scale.current == 1, "equal scores have no scale"
    first, second = torch.tensor([1.0, 3.0] * 8), torch.tensor([0.0, 10.0])
    scale.learn(first)
    assert scale.current == scale.first == pytest.approx((16 / 15) ** 0.5)
    scale.learn(second)
    assert scale.current == pytest.approx((DECAY * 16 / 15 + (1 - DECAY) * 50) ** 0.5)
    scale.learn(torch.tensor([7.0]))
    assert scale.current == pytest.approx((DECAY * 16 / 15 + (1 - DECAY) * 50) ** 0.5), "one score has no spread"
    assert scale.first == pytest.approx((16 / 15) ** 0.5)
    equal = RunningScale()
    equal.learn(torch.full((16,), 1 / 3) + 1e-8 * torch.arange(16).remainder(2))
    assert equal.current == equal.first == 1, "rounding is no variance"


def test_no_scale_is_taken_from_a_handful_of_scores() -> None:
    """Two that are nearly equal by chance would blow the sum up, on the first scales for the whole run."""
    scores = torch.tensor([0.5, 0.5001] + 7 * [0.2, 0.8])
    scale, restored = RunningScale(), RunningScale()
    for part in scores.split(2):
        assert scale.current == scale.first == 1
        scale.learn(part)
    assert scale.current == scale.first == pytest.approx(float(scores.std()))
    for part in scores.split(2):  # the same from a checkpoint after every batch
        later = RunningScale()
        later.load_state_dict(restored.state_dict())
        restored = later
        restored.learn(part)
    assert restored.state_dict() == scale.state_dict()


def test_scales_move_on_or_stay_as_asked_and_the_total_stays_on_the_first() -> None:
    moving, staying = seen(pair(scaling="running"), 1), seen(pair(scaling="first"), 1)
    expected = score_images(staying, images(), PROMPTS)
    for rewards in (moving, staying):
        rewards.learn({"red": 7 * red(images(3, 64)), "green": green(images(3, 64))})
    assert torch.equal(score_images(staying, images(), PROMPTS), expected)
    scored = measure_images(moving, images(), PROMPTS)
    assert not torch.allclose(scored.scores, expected, rtol=0.1)
    assert torch.allclose(moving.scores_on_first_scales(scored.scores, scored.raw), expected, rtol=1e-5)
    assert torch.allclose(score_images(moving.on_first_scales(), images(), PROMPTS), expected, rtol=1e-5)


def test_scales_survive_saving_and_refuse_those_of_other_rewards() -> None:
    rewards = seen(pair(), 1, 2, 3)
    restored = pair()
    restored.load_state_dict(rewards.state_dict())
    assert torch.equal(score_images(restored, images(), PROMPTS), score_images(rewards, images(), PROMPTS))
    with pytest.raises(RewardError, match=r"expected the running scales of red, green, got those of red"):
        restored.load_state_dict({"red": rewards.state_dict()["red"]})


def test_below_its_minimum_a_reward_costs_the_penalty_per_deviation_and_above_it_nothing() -> None:
    terms = [Term(Plain("red", red), 1.0), Term(Plain("green", green), 0.0, minimum=500.0)]
    rewards = seen(WeightedRewards(terms, penalty=10.0), 1)
    scale = rewards.scales()
    batch = images(5)
    batch[0, 1], batch[1, 1], batch[2, 1] = 0.4, 0.5, 0.9  # below, at and above the minimum
    scored = measure_images(rewards, batch, PROMPTS)
    lack = torch.tensor([100.0, 0.0, 0.0]) / scale["green"]
    assert torch.allclose(scored.scores, red(batch) / scale["red"] - 10 * lack, rtol=1e-4, atol=1e-4)
    assert scored.info["green/below_minimum"].tolist() == [1.0, 0.0, 0.0]


def test_the_penalty_is_continuous_so_that_its_gradient_is_all_of_it() -> None:
    rewards = WeightedRewards([Term(Plain("red", red), 1.0, minimum=0.5)], scaling="none", penalty=10.0)
    edge = torch.full((2, 3, 4, 4), 0.5)
    edge[0, 0], edge[1, 0] = 0.5 - 1e-4, 0.5 + 1e-4
    edge.requires_grad_(True)
    scores = score_images(rewards, edge, PROMPTS[:2])
    assert abs(float((scores[0] - scores[1]).detach())) < 3e-3
    (gradient,) = torch.autograd.grad(scores.sum(), edge)
    assert float(gradient[0, 0].sum()) == pytest.approx(11) and float(gradient[1, 0].sum()) == pytest.approx(1)


def test_gradients_are_the_weighted_sum_of_the_rewards_own() -> None:
    rewards = seen(pair(), 1)
    pixels = images().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score_images(rewards, pixels, PROMPTS).sum(), pixels)
    scales = rewards.scales()
    assert torch.allclose(gradient[:, 0], torch.full_like(gradient[:, 0], 1 / 16 / scales["red"]))
    assert torch.allclose(gradient[:, 1], torch.full_like(gradient[:, 1], 500 / 16 / scales["green"]))
    assert float(gradient[:, 2].abs().sum()) == 0


def test_one_reward_without_gradient_makes_the_sum_one_without() -> None:
    rewards = WeightedRewards([Term(Plain("red", red), 1.0), Term(load_reward("jpeg-compressibility"), 0.1)])
    assert not rewards.differentiable
    pixels = images().requires_grad_(True)
    assert not score_images(rewards, pixels, PROMPTS).requires_grad


def test_user_callables_are_found_out_about_inside_a_sum(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def smooth(images, prompts):\n    return images.mean((1, 2, 3))\n"
        "def cut(images, prompts):\n    return images.numpy().mean((1, 2, 3)), {'note': 1.0}\n"
    )
    both = [Term(load_reward(f"{path}:{name}"), 1.0) for name in ("smooth", "cut")]
    rewards = WeightedRewards([both[0], Term(Plain("red", red), 1.0)])
    assert rewards.differentiable is None
    assert measure_images(rewards, images().requires_grad_(True), PROMPTS).scores.requires_grad
    assert rewards.differentiable is True
    mixed = WeightedRewards(both)
    scored = measure_images(mixed, images().requires_grad_(True), PROMPTS)
    assert not scored.scores.requires_grad and mixed.differentiable is False
    assert scored.info["mine.py:cut/note"].tolist() == [1.0, 1.0, 1.0]


def test_a_bad_score_of_one_reward_names_it() -> None:
    spoiled = WeightedRewards([Term(Plain("red", red), 1.0), Term(Plain("broken", lambda x: red(x) / 0), 1.0)])
    with pytest.raises(RewardError, match="reward 'broken': expected finite scores"):
        score_images(spoiled, images(), PROMPTS)


def test_video_and_image_rewards_mix() -> None:
    videos = torch.rand(2, 3, 3, 8, 8)
    rewards = WeightedRewards(
        [Term(Plain("red", red), 1.0), Term(load_reward("temporal-flicker"), 2.0)], scaling="none"
    )
    expected = videos[:, :, 0].mean((1, 2, 3)) + 2 * score_images(load_reward("temporal-flicker"), videos, ["a", "b"])
    assert torch.allclose(score_images(rewards, videos, ["a", "b"]), expected)


def test_heldout_rewards_score_by_the_first_and_show_all() -> None:
    heldout = HeldoutRewards([Plain("green", green), Plain("red", red), Plain("red", lambda x: 2 * red(x))])
    scored = measure_images(heldout, images().requires_grad_(True), PROMPTS)
    assert heldout.name == "green" and not scored.scores.requires_grad
    assert torch.equal(scored.scores, green(images()))
    assert torch.equal(scored.raw["red (2)"], 2 * scored.raw["red"])
