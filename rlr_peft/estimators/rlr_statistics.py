"""What the RLR estimator learns from calibrations and updates: running statistics, which choose the terms to come."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlr_peft.estimators.signal_sizes import SignalSizes
from rlr_peft.estimators.stage_window import step_energies
from rlr_peft.estimators.state_baseline import BaselineObservation, StateBaseline
from rlr_peft.estimators.step_gains import StepGains, calibration_sizes, step_gains
from rlr_peft.estimators.step_gradients import StepGradients, StepVariances

NORM_DECAY = 0.9
# Rare samples must not be forgotten soon, the rewards of much weaker weights should be.
SIZE_DECAY = 0.99


@dataclass
class RLRMemory:
    """What one micro-batch teaches the next updates.

    Attributes:
        block_norms: first step and unweighted gradient norm of every half-order block.
        baselines: observations of the state baseline.
        sizes: of advantages and cotangents; None unless K is measured.
    """

    block_norms: list[tuple[int, float]] = field(default_factory=list)
    baselines: list[BaselineObservation] = field(default_factory=list)
    sizes: SignalSizes | None = None


class RLRStatistics:
    """Running statistics of past updates and calibrations only, so that what they choose biases no estimate.

    Args:
        state_baseline: whether there is a state baseline to learn.

    Attributes:
        step_variances: of the terms, which choose K; None before the first calibration.
        step_energies: gradient energies of the steps, (T,), which choose the window; None before the first calibration.
        block_norms: gradient norm of half-order blocks by first step.
        state_baseline: None without one.
    """

    def __init__(self, state_baseline: bool) -> None:
        self.step_variances: StepVariances | None = None
        self.step_energies: torch.Tensor | None = None
        self.block_norms: dict[int, float] = {}
        self.state_baseline = StateBaseline() if state_baseline else None
        self._step_gains: StepGains | None = None
        self._signal_sizes = SignalSizes()

    def calibrate(self, gradients: StepGradients, decay: float) -> None:
        """Blends what a calibration measured into the running statistics; ``decay`` is the weight of the past."""
        measured = step_gains(gradients)
        self._step_gains = measured if self._step_gains is None else self._step_gains.blend(measured, decay)
        energies = step_energies(gradients)
        older = energies if self.step_energies is None else self.step_energies
        self.step_energies = decay * older + (1 - decay) * energies
        self._see([calibration_sizes(gradients)])

    def remember(self, memories: Iterable[RLRMemory]) -> None:
        """Blends what a finished update saw, in all micro-batches and processes, into the running statistics."""
        by_step: defaultdict[int, list[float]] = defaultdict(list)
        baselines: list[BaselineObservation] = []
        sizes: list[SignalSizes] = []
        for memory in memories:
            baselines += memory.baselines
            if memory.sizes is not None:
                sizes.append(memory.sizes)
            for first_step, norm in memory.block_norms:
                by_step[first_step].append(norm)
        for first_step, norms in by_step.items():
            newer = sum(norms) / len(norms)
            older = self.block_norms.get(first_step, newer)
            self.block_norms[first_step] = NORM_DECAY * older + (1 - NORM_DECAY) * newer
        if self.state_baseline is not None:
            self.state_baseline.remember(baselines)
        if sizes:
            self._see(sizes)

    def state_dict(self) -> dict[str, Any]:
        """The statistics, of plain types and tensors."""
        return {
            "step_gains": None if self._step_gains is None else dict(vars(self._step_gains)),
            "step_energies": self.step_energies,
            "signal_sizes": self._signal_sizes.state_dict(),
            "running_norms": dict(self.block_norms),
            "state_baseline": None if self.state_baseline is None else self.state_baseline.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.step_energies = state.get("step_energies")
        self._signal_sizes = SignalSizes.from_state_dict(state["signal_sizes"])
        if state["step_gains"] is not None:
            self._step_gains = StepGains(**state["step_gains"])
            self.step_variances = self._step_gains.variances(self._signal_sizes)
        self.block_norms = dict(state["running_norms"])
        if self.state_baseline is not None and state["state_baseline"] is not None:
            self.state_baseline.load_state_dict(state["state_baseline"])

    def _see(self, sizes: Iterable[SignalSizes]) -> None:
        """Learns from the samples of one update or calibration how large signals are."""
        self._signal_sizes = self._signal_sizes.blend(sizes, SIZE_DECAY)
        if self._step_gains is not None:
            self.step_variances = self._step_gains.variances(self._signal_sizes)
