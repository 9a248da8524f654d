"""How far a run has come."""

from dataclasses import dataclass
from pathlib import Path


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
    """

    step: int = 0
    seconds: float = 0.0
    denoiser_evaluations: int = 0
    peak_memory_mb: float = 0.0
    coverage: str = ""
    stopped_early: str = ""
    interrupted_by: int = 0
    resumed_from: Path | None = None


def is_due_after(step: int, interval: int | None) -> bool:
    """Whether something that is done every `interval` updates is done after update `step`, the first being 1.

    Checkpoints, validation images, the divergence and publishing all count so. None is never.
    """
    return interval is not None and step % interval == 0
