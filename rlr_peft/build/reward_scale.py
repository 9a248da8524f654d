"""Reward normalisation: one running scale by which the whole gradient is divided, so that no term gains on another."""

from collections.abc import Mapping
from typing import Any

import torch

from rlr_peft.rewards.combination import DECAY, variance


class RewardScale:
    """The running standard deviation of the rewards of past updates.

    The first update whose rewards differ has only its own.
    """

    def __init__(self) -> None:
        self._variance = 0.0

    def scale(self, rewards: torch.Tensor) -> float:
        """The divisor for an update with these rewards (N,) of all processes, which then join the past.

        The divisor is 1 as long as all rewards were equal.
        """
        own = variance(rewards)
        past = self._variance or own
        if len(rewards) > 1:  # a single one says nothing of the spread
            self._variance = DECAY * past + (1 - DECAY) * own
        return past**0.5 if past > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """The running variance."""
        return {"variance": self._variance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._variance = state["variance"]
