"""Advantages: rewards relative to what the same prompt earns otherwise."""

import torch


def leave_one_out(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each reward minus the mean of the others of its prompt: ``n / (n - 1) * (R_i - mean)``.

    The baseline of a sample does not contain the sample, so score-function terms stay exactly unbiased.

    Args:
        rewards: (N,), samples of one prompt side by side.
        group_size: n, samples per prompt; with 1 there is no baseline and the rewards are returned as they are.

    Returns:
        Advantages, (N,).

    Raises:
        ValueError: N is not a multiple of the group size.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"Expected a multiple of {group_size} rewards (samples per prompt), got {len(rewards)}.")
    if group_size == 1:
        return rewards
    groups = rewards.reshape(-1, group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) * (group_size / (group_size - 1))
    return advantages.reshape(-1)
