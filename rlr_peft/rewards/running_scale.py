"""The running standard deviation of a reward, from the past only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9
# A variance below this share of the mean square is what float32 networks round by: the scores are all equal.
ROUNDING = 1e-10
# Fewer scores say too little: the deviation of four is below a third of the true one in one case of twenty.
MIN_SCORES = 16


class RunningScale:
    """Remembers variances of batches; a batch can be divided by the scale of those before it.

    Args:
        decay: weight of the past.

    Attributes:
        first: the scale of the first `MIN_SCORES` scores or more in a row that differed; 1 until then.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self._decay = decay
        self._variance = 0.0
        self._early: list[float] = []  # latest scores, as long as they are too few or too equal for a scale
        self.first = 1.0

    @property
    def current(self) -> float:
        """The scale of the batches so far; 1 as long as their scores were fewer than `MIN_SCORES`, or all equal."""
        return self._variance**0.5 if self._variance > 0 else 1.0

    def observe(self, scores: Tensor) -> None:
        """Adds the scores (N,) of a batch to the past; once there is a scale, a single one tells nothing."""
        if self._variance > 0:
            if len(scores) > 1:
                self._variance = self._decay * self._variance + (1 - self._decay) * variance(scores)
            return
        early = torch.cat([torch.tensor(self._early, dtype=torch.float64), scores.double().cpu()])
        early = early[-max(MIN_SCORES, len(scores)) :]
        if len(early) >= MIN_SCORES and (own := variance(early)) > 0:
            self._variance, self._early, self.first = own, [], own**0.5
        else:
            self._early = early.tolist()

    def state_dict(self) -> dict[str, Any]:
        """All that was remembered."""
        return {"variance": self._variance, "early": self._early, "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._variance, self._early, self.first = state["variance"], list(state["early"]), state["first"]


def variance(scores: Tensor) -> float:
    """Sample variance of scores (N,) in float64; 0 where they are equal up to rounding, or fewer than two."""
    values = scores.double()
    spread = float(values.var()) if len(values) > 1 else 0.0
    return spread if spread > ROUNDING * float(values.square().mean()) else 0.0
