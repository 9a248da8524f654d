"""Advantages: rewards relative to what the same prompt earns otherwise."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

# Keeps the division by a group's standard deviation finite, as in DDPO and GRPO.
STD_FLOOR = 1e-4
# Whose rewards' standard deviation advantages are divided by.
DividedBy = Literal["prompt", "update"]


def leave_one_out(rewards: torch.Tensor, group_size: int, antithetic: bool = False) -> torch.Tensor:
    """Each reward minus the mean of the others of its prompt: ``n / (n - 1) * (R_i - mean)``.

    The baseline of a sample does not contain the sample, so score-function terms stay exactly unbiased.

    Args:
        rewards: (N,), samples of one prompt side by side.
        group_size: n, samples per prompt; with 1 there is no baseline and the rewards are returned as they are.
        antithetic: samples come in neighbouring pairs with antithetic noise; a sample's partner is left out too.

    Returns:
        Advantages, (N,).

    Raises:
        ValueError: N is not a multiple of the group size, or antithetic groups are not of whole pairs, two or more.
    """
    groups = _groups(rewards, group_size)
    if antithetic:
        if group_size % 2 or group_size < 4:
            raise ValueError(f"Expected an even group of 4 or more antithetic samples, got {group_size}.")
        pairs = groups.reshape(len(groups), -1, 2).sum(dim=2).repeat_interleave(2, dim=1)
        others = (groups.sum(dim=1, keepdim=True) - pairs) / (group_size - 2)
        return (groups - others).reshape(-1)
    if group_size == 1:
        return rewards
    advantages = (groups - groups.mean(dim=1, keepdim=True)) * (group_size / (group_size - 1))
    return advantages.reshape(-1)


def group_normalized(rewards: torch.Tensor, group_size: int, over: DividedBy = "prompt") -> torch.Tensor:
    """GRPO's ``(R_i - mean) / std``: mean of the prompt's samples; mean and std contain the sample, a small bias.

    Args:
        rewards: (N,), samples of one prompt side by side.
        group_size: n >= 2, samples per prompt.
        over: the std is that of the prompt's samples, so that every prompt counts alike, also one whose samples hardly
            differ; or that of all samples, as in published configs of Flow-GRPO and AWM.

    Raises:
        ValueError: N is not a multiple of the group size, or the group is a single sample.
    """
    groups = _groups(rewards, group_size)
    if group_size < 2:
        raise ValueError("Expected 2 or more samples per prompt to normalise within a group, got 1.")
    std = groups.std(dim=1, keepdim=True, correction=0) if over == "prompt" else rewards.std(correction=0)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (std + STD_FLOOR)).reshape(-1)


def normalised_in_words(over: DividedBy) -> str:
    """How ``group_normalized`` divides."""
    return "group-normalised" if over == "prompt" else "update-normalised"


def separately_normalized(
    rewards: Mapping[str, torch.Tensor], weights: Mapping[str, float], group_size: int
) -> torch.Tensor:
    """GDPO's advantages (2601.05242): every reward's own, normalised within the group, summed, and brought to std 1.

    Normalised as a sum, combinations of rewards that differ may have the same advantage, and a reward with a small
    spread has next to none.

    Args:
        rewards: of all processes, by name, (N,), samples of one prompt side by side.
        weights: of the rewards, by the same names.
        group_size: n >= 2, samples per prompt.

    Returns:
        Advantages, (N,).
    """
    total = sum(weights[name] * group_normalized(values, group_size) for name, values in rewards.items())
    assert isinstance(total, torch.Tensor)
    return total / (total.std(correction=0) + STD_FLOOR)


class PromptStatistics:
    """DDPO's ``(R - mean) / std`` with mean and std of the prompt's latest rewards over several updates.

    A prompt seen fewer than ``min_count`` times is compared with the whole batch instead.

    Args:
        buffer_size: rewards remembered per prompt.
        min_count: rewards that a prompt needs for statistics of its own.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rewards: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))

    def observe(self, prompts: Sequence[str], rewards: Sequence[float]) -> None:
        """Adds the rewards (N,) of a finished update, of all processes."""
        for prompt, reward in zip(prompts, rewards, strict=True):
            self._rewards[prompt].append(reward)

    def normalized(self, rewards: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Advantages (N,) of the rewards of all processes, compared with the latest ones, themselves among them."""
        batch = rewards.detach().float().cpu()
        latest = {prompt: self._rewards[prompt].copy() for prompt in dict.fromkeys(prompts)}
        for prompt, reward in zip(prompts, batch.tolist(), strict=True):
            latest[prompt].append(reward)
        advantages = []
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            known = latest[prompt]
            compared = torch.tensor(list(known)) if len(known) >= self.min_count else batch
            advantages.append((reward - float(compared.mean())) / (float(compared.std(correction=0)) + STD_FLOOR))
        return torch.tensor(advantages, dtype=rewards.dtype, device=rewards.device)

    def state_dict(self) -> dict[str, Any]:
        """The remembered rewards by prompt."""
        # Plain texts: a checkpoint holds no classes of ours.
        return {"rewards": {str(prompt): list(values) for prompt, values in self._rewards.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._rewards.clear()
        for prompt, values in state["rewards"].items():
            self._rewards[prompt].extend(values)


def _groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"Expected a multiple of {group_size} rewards (samples per prompt), got {len(rewards)}.")
    return rewards.reshape(-1, group_size)
