"""The running scale of the rewards."""

import pytest
import torch

from rlr_peft.build.reward_scale import DECAY, RewardScale


def test_the_scale_is_of_past_updates_and_of_its_own_for_the_first() -> None:
    first, second, third = (torch.tensor(values) for values in ([1.0, 3.0], [0.0, 10.0], [5.0, 5.0]))
    scale = RewardScale()
    assert scale.scale(first) == pytest.approx(2**0.5)
    assert scale.scale(second) == pytest.approx(2**0.5), "an update does not scale itself, which would bias it"
    assert scale.scale(third) == pytest.approx((DECAY * 2 + (1 - DECAY) * 50) ** 0.5)
    assert scale.scale(first) == pytest.approx((DECAY * (DECAY * 2 + (1 - DECAY) * 50)) ** 0.5)


def test_rewards_that_are_equal_but_for_rounding_are_not_scaled() -> None:
    assert RewardScale().scale(torch.tensor([0.1, 0.1, 0.1 + 1e-8])) == 1
    assert RewardScale().scale(torch.tensor([3.0])) == 1
    scale = RewardScale()
    assert scale.scale(torch.full((4,), 0.1)) == 1
    assert scale.scale(torch.tensor([1.0, 3.0])) == pytest.approx(2**0.5), "the first whose rewards differ"
    assert scale.scale(torch.tensor([5.0, 5.0])) == pytest.approx(2**0.5)
    assert scale.scale(torch.tensor([1.0, 3.0])) == pytest.approx((DECAY * 2) ** 0.5)


def test_single_samples_leave_the_scale_where_it_is() -> None:
    """They have no spread; counted as equal scores they would shrink the divisor to nothing."""
    scale = RewardScale()
    assert scale.scale(torch.tensor([1.0, 3.0])) == pytest.approx(2**0.5)
    for _ in range(50):
        assert scale.scale(torch.tensor([2.0])) == pytest.approx(2**0.5)


def test_the_state_survives_a_round_trip() -> None:
    scale, restored = RewardScale(), RewardScale()
    restored.load_state_dict(scale.state_dict())
    rewards = torch.tensor([1.0, 3.0])
    assert restored.scale(rewards) == scale.scale(rewards)
    later = RewardScale()
    later.load_state_dict(scale.state_dict())
    for rewards in (torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.5])):
        assert later.scale(rewards) == scale.scale(rewards)
