"""What the trainer asks of every estimator, and what it gets back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.coverage import Coverage
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.rollout import Rollout


@dataclass(frozen=True)
class EstimatorReport:
    """What an estimator did with one micro-batch.

    Attributes:
        coverage: what the estimate covers.
        gradient_norms: Euclidean norms of each term's parts for the mean reward of the micro-batch, summed by term.
        backward_steps: backward passes through a denoiser step, per sample.
        first_order_steps: K, steps covered by the pathwise gradient.
        hot_steps: score-term steps whose mean reacts too strongly to the denoiser, with ``|d mean / d output| / std``.
        metrics: other numbers for the logs.
        memory: what the estimator wants to hear again, of all micro-batches and processes, once the update is done.
    """

    coverage: Coverage
    gradient_norms: Mapping[str, float]
    backward_steps: int
    first_order_steps: int = 0
    hot_steps: Mapping[int, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    memory: Any = None


class Estimator(Protocol):
    """Turns sampled and scored rollouts into gradients of the expected reward.

    Attributes:
        inner_epochs: optimiser steps taken on the same samples.
    """

    inner_epochs: int

    @property
    def uses_reward_gradient(self) -> bool:
        """Whether a reward's gradient is of use; without, its tape and the decoder's are spared."""

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards; `has_gradient` is the reward's, None where that is not known."""

    @property
    def needs_calibration(self) -> bool:
        """Whether ``calibrate`` must run before the first update and every so often."""

    @property
    def calibrates_without_gradient(self) -> bool:
        """Whether ``calibrate`` is of use for a reward without gradient too."""

    @property
    def is_calibrated(self) -> bool:
        """Whether ``calibrate`` has run, in this session or before the checkpoint that was loaded."""

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], decay: float) -> None:
        """Measures on rollouts that no update uses; ``decay`` is the weight of the past."""

    def observe(self, prompts: Sequence[str], rewards: torch.Tensor) -> None:
        """Hears the rewards (N,) of all processes of an update, before ``advantages`` is asked."""

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        """Advantages (N,) of rewards (N,), the samples of one prompt side by side."""

    def accumulate(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> EstimatorReport:
        """Adds the estimated gradient of the micro-batch's SUMMED reward to ``.grad`` of the chain's parameters."""

    def remember(self, memories: Iterable[Any]) -> None:
        """Hears the reports' memories of a finished update."""

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, of plain types and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""


class StatelessEstimator:
    """The members of an estimator that measures and remembers nothing."""

    inner_epochs = 1
    needs_calibration = False
    is_calibrated = True
    calibrates_without_gradient = False
    uses_reward_gradient = False

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], decay: float) -> None:
        """Nothing to measure."""

    def observe(self, prompts: Sequence[str], rewards: torch.Tensor) -> None:
        """Nothing to learn from other processes."""

    def remember(self, memories: Iterable[Any]) -> None:
        """Nothing to remember."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
