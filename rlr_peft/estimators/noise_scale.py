"""The gradient noise scale of the estimate in use, from the gradients of successive updates: it costs nothing.

With g the mean over the B samples of an update, ``E |g|^2 = |E g|^2 + tr(S) / B`` for the covariance S of a single
sample's estimate, and neighbouring updates, whose samples are independent and whose weights hardly differ, show
``E <g, g'> = |E g|^2``. Their ratio tr(S) / |E g|^2 is the noise scale N (McCandlish et al. 2018, arXiv:1812.06162).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

# Weight of the past in the running means, and how many pairs of neighbours the first answer takes.
DECAY = 0.9
FIRST_PAIRS = 8


class NoiseScale:
    """Running means over updates.

    Attributes:
        pairs: of neighbouring updates that were seen.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self._signal = self._noise = 0.0
        self._last: torch.Tensor | None = None
        self._last_samples = 0

    def see(self, sketch: torch.Tensor, samples: int) -> None:
        """Learns from an update's mean gradient, given as a sketch (d,) that keeps inner products.

        Args:
            samples: B of this update.
        """
        sketch = sketch.double()
        if self._last is not None:
            signal = float(sketch @ self._last)
            noises = (
                (float(sketch @ sketch) - signal) * samples,
                (float(self._last @ self._last) - signal) * self._last_samples,
            )
            weight = max(1 - DECAY, 1 / (self.pairs + 1))
            self._signal += weight * (signal - self._signal)
            self._noise += weight * (sum(noises) / 2 - self._noise)
            self.pairs += 1
        self._last, self._last_samples = sketch, samples

    def value(self) -> float | None:
        """N in samples; infinite while no signal shows; None before enough updates were seen."""
        if self.pairs < FIRST_PAIRS:
            return None
        return max(0.0, self._noise) / self._signal if self._signal > 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        """The running means and the last gradient's sketch."""
        return {
            "pairs": self.pairs,
            "signal": self._signal,
            "noise": self._noise,
            "last": self._last,
            "last_samples": self._last_samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.pairs, self._signal, self._noise = state["pairs"], state["signal"], state["noise"]
        self._last, self._last_samples = state["last"], state["last_samples"]
