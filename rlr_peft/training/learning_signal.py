"""Whether updates teach anything: a reward that is constant, or too faint for the optimiser, is said to be."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlr_peft.build.run import Run
from rlr_peft.training.update import SATISFIED

logger = logging.getLogger(__name__)

# Adam divides a gradient g by |g| + epsilon. Where g is this share of epsilon or less, its step is that share of the
# learning rate or less, instead of about 1.
FAINT = 0.01
FOR_FAINT_REWARDS = "multiply the reward by a constant, or have it scaled: --reward_fn '{NAME: 1}'"


class LearningSignal:
    """Says once when there is nothing to learn from an update.

    Args:
        reward_name: of what is trained on.
        num_parameters: trainable ones.
        adam_epsilon: of the optimiser; 0 for one whose step does not depend on the gradient's size.
    """

    def __init__(self, reward_name: str, num_parameters: int, adam_epsilon: float) -> None:
        self._reward_name = reward_name
        self._num_parameters = num_parameters
        self._epsilon = adam_epsilon
        self._has_warned = False

    @classmethod
    def of(cls, run: Run) -> "LearningSignal":
        """That of a run."""
        parameters = sum(parameter.numel() for parameter in run.chain.parameters)
        optimizer = run.config.optimizer
        has_epsilon = optimizer.optimizer in ("AdamW", "Prodigy")
        return cls(run.reward.name, parameters, optimizer.adam_epsilon if has_epsilon else 0.0)

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warns, the first time, if the update that ended with this step taught nothing.

        Args:
            step: from 1.
            metrics: the update's.
        """
        why = self._lack(metrics)
        if why is not None and not self._has_warned:
            logger.warning("Update %d taught nothing: %s.", step, why)
            self._has_warned = True

    def verdict(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """One sentence if no update of a run taught anything; None otherwise, or without updates.

        Args:
            records: the metrics of all updates.
        """
        lacks = [self._lack(record) for record in records]
        if not lacks or None in lacks:
            return None
        last = "" if len(set(lacks)) == 1 else "in the last, "
        return f"Nothing was learnt in {len(lacks)} updates: {last}{lacks[-1]}."

    def _lack(self, metrics: Mapping[str, float]) -> str | None:
        """Why an update teaches nothing, in words; None if it does."""
        if metrics.get(SATISFIED) == 1:
            return "all images have reached the --reward_limit"
        who, norm = f"reward '{self._reward_name}'", metrics["gradient_norm"]
        if norm == 0 and metrics["reward_se"] == 0:
            return (
                f"{who} scored all images the same ({metrics['reward']:g}), so no image is better than another "
                "(advantages are zero), and its gradient is zero"
            )
        if norm == 0:
            return (
                f"the gradient of {who} is zero: the images of each prompt scored the same, or it vanishes in float32; "
                f"all scores have a standard error of {metrics['reward_se']:.1g}: if that is little, "
                f"{FOR_FAINT_REWARDS}"
            )
        typical = norm / math.sqrt(self._num_parameters)
        if typical > FAINT * self._epsilon:
            return None
        return (
            f"the gradient of {who} is too faint, {typical:.0e} in a typical weight, against --adam_epsilon "
            f"{self._epsilon:g}, so that weights move by {typical / self._epsilon:.0e} of the learning rate; "
            f"{FOR_FAINT_REWARDS}"
        )
