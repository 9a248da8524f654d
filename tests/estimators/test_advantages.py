"""Advantages by hand-made numbers, and the statistics that DDPO keeps."""

import json

import pytest
import torch

from rlr_peft.estimators import STD_FLOOR, PromptStatistics, group_normalized, leave_one_out, separately_normalized


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0]
    torch.testing.assert_close(leave_one_out(rewards, 3), torch.tensor(expected))
    assert torch.equal(leave_one_out(rewards, 1), rewards)
    with pytest.raises(ValueError, match="multiple of 4"):
        leave_one_out(rewards, 4)


def test_antithetic_leave_one_out_compares_with_the_other_pairs() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0, 3.0])
    others = [13 / 4, 13 / 4, 10 / 4, 10 / 4, 9 / 4, 9 / 4]
    torch.testing.assert_close(leave_one_out(rewards, 6, antithetic=True), rewards - torch.tensor(others))
    two_groups = torch.cat([rewards[:4], 10 + rewards[:4]])
    advantages = leave_one_out(two_groups, 4, antithetic=True)
    torch.testing.assert_close(advantages[:4], torch.tensor([1 - 3, 2 - 3, 6 - 1.5, 0 - 1.5]))
    torch.testing.assert_close(advantages[4:], advantages[:4])
    for group_size in (2, 3):
        with pytest.raises(ValueError, match=f"even group of 4 or more antithetic samples, got {group_size}"):
            leave_one_out(rewards, group_size, antithetic=True)


def test_group_normalized_has_mean_0_and_deviation_1_in_every_group() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0, -2.0, 0.0], dtype=torch.float64)
    advantages = group_normalized(rewards, 2)
    expected = 1 / (1 + STD_FLOOR)
    assert advantages.tolist() == pytest.approx([-expected, expected, 0, 0, -expected, expected])
    with pytest.raises(ValueError, match="2 or more samples per prompt"):
        group_normalized(rewards, 1)


def test_divided_by_the_updates_deviation_prompts_count_as_much_as_their_samples_differ() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0, -2.0, 2.0], dtype=torch.float64)
    std = float(rewards.std(correction=0)) + STD_FLOOR
    expected = [deviation / std for deviation in (-1, 1, 0, 0, -2, 2)]
    assert group_normalized(rewards, 2, "update").tolist() == pytest.approx(expected)
    same = torch.full((4,), 5.0)
    assert not group_normalized(same, 2, "update").any()


def test_separately_normalized_rewards_keep_what_their_sum_loses() -> None:
    """GDPO's own case: one of two samples earns one reward, or both of them; in a third group none differs."""
    first = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    second = torch.tensor([5.0, 5.0, 0.0, 1000.0, 2.0, 2.0])
    rewards = {"first": first, "second": second}
    one, both, none = separately_normalized(rewards, {"first": 1.0, "second": 1.0}, 2).reshape(3, 2)
    assert none.tolist() == [0.0, 0.0]
    torch.testing.assert_close(both, 2 * one, rtol=1e-3, atol=0)
    together = group_normalized((first + second)[:4], 2).reshape(2, 2)
    torch.testing.assert_close(together[0], together[1], rtol=1e-3, atol=0)
    weighted = separately_normalized(rewards, {"first": 1.0, "second": -3.0}, 2)
    assert float(weighted.std(correction=0)) == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(weighted[2:4], -2 * weighted[:2], rtol=1e-3, atol=0)


def observed(statistics: PromptStatistics, prompts: str, rewards: list[float]) -> list[float]:
    advantages = statistics.normalized(torch.tensor(rewards), list(prompts))
    statistics.observe(list(prompts), rewards)
    return advantages.tolist()


def test_a_prompt_is_compared_with_the_batch_until_it_is_known_well_enough() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=3)
    # both prompts are known twice: the batch has mean 4 and deviation 3
    first = observed(statistics, "aabb", [1.0, 3.0, 3.0, 9.0])
    assert first == pytest.approx([value / (3 + STD_FLOOR) for value in (-3, -1, -1, 5)], abs=1e-6)
    # a is now known with 1, 3, 5, 7 (mean 4, deviation sqrt 5), b with 3, 9, -1 - still b counts three
    second = observed(statistics, "aab", [5.0, 7.0, -1.0])
    assert second[:2] == pytest.approx([1 / (5**0.5 + STD_FLOOR), 3 / (5**0.5 + STD_FLOOR)], abs=1e-6)
    b_mean, b_std = 11 / 3, torch.tensor([3.0, 9.0, -1.0]).std(correction=0).item()
    assert second[2] == pytest.approx((-1 - b_mean) / (b_std + STD_FLOOR), abs=1e-5)
    # the oldest rewards of a are forgotten: 5, 7, 9, 11
    third = observed(statistics, "aa", [9.0, 11.0])
    assert third == pytest.approx([1 / (5**0.5 + STD_FLOOR), 3 / (5**0.5 + STD_FLOOR)], abs=1e-6)


def test_prompt_statistics_survive_a_round_trip() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=3)
    observed(statistics, "aabb", [1.0, 3.0, 3.0, 9.0])
    restored = PromptStatistics(buffer_size=4, min_count=3)
    restored.observe(["stale"], [1.0])
    restored.load_state_dict(json.loads(json.dumps(statistics.state_dict())))
    assert observed(restored, "aabc", [5.0, 7.0, -1.0, 2.0]) == observed(statistics, "aabc", [5.0, 7.0, -1.0, 2.0])
    assert restored.state_dict() == statistics.state_dict()
