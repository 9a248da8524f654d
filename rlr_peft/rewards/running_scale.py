"""The running standard deviation of a reward, from the past only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

DECAY = 0.9
# A variance below this share of the mean square is rounding of float32: the scores are all equal.
ROUNDING = 1e-12


class RunningScale:
    """Remembers variances of batches; a batch can be divided by the scale of those before it.

    Args:
        decay: weight of the past.

    Attributes:
        first: the scale of the first batch whose scores differed; 1 until then.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self._decay = decay
        self._variance = 0.0
        self.first = 1.0

    @property
    def current(self) -> float:
        """The scale of the batches so far; 1 as long as all their scores were equal."""
        return self._variance**0.5 if self._variance > 0 else 1.0

    def observe(self, scores: Tensor) -> None:
        """Adds the scores (N,) of a batch to the past."""
        own = variance(scores)
        if self._variance > 0:
            self._variance = self._decay * self._variance + (1 - self._decay) * own
        elif own > 0:
            self._variance = own
            self.first = own**0.5

    def state_dict(self) -> dict[str, Any]:
        """All that was remembered."""
        return {"variance": self._variance, "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._variance, self.first = state["variance"], state["first"]


def variance(scores: Tensor) -> float:
    """Sample variance of scores (N,) in float64; 0 where they are equal up to rounding, or fewer than two."""
    values = scores.double()
    spread = float(values.var()) if len(values) > 1 else 0.0
    return spread if spread > ROUNDING * float(values.square().mean()) else 0.0
