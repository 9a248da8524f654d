"""How far a run has come, and whether it should stop: where its held-out reward falls, or it leaves the base behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# A window must fall this many standard errors below the best one. The best is the best of many by chance too, and every
# window is a test: with windows of 5 updates or more, noise alone stops about 1 % of the runs of 50 windows.
SIGNIFICANT = 4.5
KL_WINDOW = 10


@dataclass(frozen=True)
class Stop:
    """The decision to end training.

    Attributes:
        sentence: why, in one sentence.
        weights: what to go back to; None to keep the present weights.
    """

    sentence: str
    weights: list[torch.Tensor] | None = None


class EarlyStopping:
    """Watches the held-out reward in windows of updates, and the divergence from the base.

    Args:
        window: updates per window of the held-out reward; None does not watch it.
        kl_limit: nats that the mean of the last ten measured divergences must not pass; None does not watch them.
    """

    def __init__(self, window: int | None, kl_limit: float | None) -> None:
        self.window = window
        self.kl_limit = kl_limit
        self._best_weights: list[torch.Tensor] | None = None
        self._best: tuple[int, float] | None = None  # last update, mean
        self._variances: list[float] = []  # within each window so far
        self._heldout: list[float] = []
        self._kl: list[float] = []

    def check(self, step: int, heldout: float | None, kl: float | None, weights: Sequence[torch.Tensor]) -> Stop | None:
        """Takes the numbers of a finished update; returns the decision to stop, or None.

        Args:
            step: finished updates.
            heldout: mean held-out reward of the update's samples.
            kl: mean divergence of the update's samples in nats, if it was measured.
            weights: after the update.
        """
        return self._check_heldout(step, heldout, weights) or self._check_kl(step, kl)

    def _check_heldout(self, step: int, heldout: float | None, weights: Sequence[torch.Tensor]) -> Stop | None:
        if self.window is None or heldout is None:
            return None
        self._heldout.append(heldout)
        if len(self._heldout) < self.window:
            return None
        values = torch.tensor(self._heldout, dtype=torch.float64)
        mean = float(values.mean())
        self._heldout = []
        self._variances.append(float(values.var()))
        if self._best is None or mean > self._best[1]:
            self._best = (step, mean)
            self._best_weights = [weight.detach().clone() for weight in weights]
            return None
        best_step, best_mean = self._best
        # Pooled over all windows: a short one alone tells too little of its own variance.
        variance = sum(self._variances) / len(self._variances)
        if best_mean - mean > SIGNIFICANT * (2 * variance / self.window) ** 0.5:
            return Stop(
                f"Stopped at update {step} because the held-out reward fell from {best_mean:.4g} (updates up to "
                f"{best_step}) to {mean:.4g}; the weights are those of update {best_step}.",
                self._best_weights,
            )
        return None

    def _check_kl(self, step: int, kl: float | None) -> Stop | None:
        if self.kl_limit is None or kl is None:
            return None
        self._kl = [*self._kl, kl][-KL_WINDOW:]
        mean = sum(self._kl) / len(self._kl)
        if len(self._kl) == KL_WINDOW and mean > self.kl_limit:
            return Stop(
                f"Stopped at update {step} because the divergence from the base, {mean:.4g} nats, passed the limit of "
                f"{self.kl_limit:g}."
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """All numbers that still count."""
        return {
            "best_weights": self._best_weights,
            "best": self._best,
            "variances": self._variances,
            "heldout": self._heldout,
            "kl": self._kl,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._best_weights = state["best_weights"]
        self._best = None if state["best"] is None else tuple(state["best"])
        self._variances, self._heldout = list(state["variances"]), list(state["heldout"])
        self._kl = list(state["kl"])


@dataclass
class Progress:
    """How far a run has come, over all its sessions.

    Attributes:
        step: finished updates.
        seconds: time spent training.
        denoiser_evaluations: of all processes, for training.
        peak_memory_mb: peak memory of the main process, in MB (2**20 bytes).
        coverage: what the estimator's last plan covers, in words.
        stopped_early: why training was stopped before its last step, in one sentence; empty if it was not.
        interrupted_by: exit code of the signal that ended this session early; 0 for none.
        resumed_from: the checkpoint that this session goes on from; None for a start from scratch.
        evaluation_seconds: what the base's evaluation took in this session.
        early_stopping: watches for reward hacking.
    """

    step: int = 0
    seconds: float = 0.0
    denoiser_evaluations: int = 0
    peak_memory_mb: float = 0.0
    coverage: str = ""
    stopped_early: str = ""
    interrupted_by: int = 0
    resumed_from: Path | None = None
    evaluation_seconds: float = 0.0
    early_stopping: EarlyStopping = field(default_factory=lambda: EarlyStopping(None, None))


def is_due_after(step: int, interval: int | None) -> bool:
    """Whether something that is done every `interval` updates is done after update `step`, the first being 1.

    Checkpoints, validation images, the divergence and publishing all count so. None is never.
    """
    return interval is not None and step % interval == 0
