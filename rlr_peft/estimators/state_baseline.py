"""State baseline (SB): what the sample's own state already tells of its reward, taken off its advantage.

At step t the denoiser predicts the image from x_t, before the step's noise is drawn, so the reward of that prediction
may be subtracted without bias. It costs one reward call per sample and step, and tells something only late in the
chain.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.rollout import Rollout

# A variance below this share of the mean square is rounding: the predictions are all the same.
ROUNDING = 1e-9


@dataclass(frozen=True)
class BaselineObservation:
    """Advantages and predicted advantages of one micro-batch at step t."""

    t: int
    advantages: list[float]
    predictions: list[float]


class StateBaseline:
    """``A_t = A - kappa_t (R(x0hat(x_t)) - R_others - m_t)``, with kappa_t = Cov / Var and m_t of past updates only.

    Args:
        decay: weight of the past in the running moments.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        # by step: mean of predictions, of their squares, and of their products with the advantages
        self._moments: dict[int, tuple[float, float, float]] = {}

    def kappa(self, t: int) -> float:
        """Regression coefficient of the advantage on the prediction at step t; 0 while nothing is known."""
        mean, square, product = self._moments.get(t, (0.0, 0.0, 0.0))
        variance = square - mean**2
        return product / variance if variance > ROUNDING * square else 0.0

    def correct(self, objective: Objective, rollout: Rollout, t: int) -> tuple[torch.Tensor, BaselineObservation]:
        """Advantages (B,) for the score term of step t, and what to remember of them."""
        predicted = objective.score(rollout.trajectory.pred_original_samples[t - 1], rollout.trajectory.prompts)
        predictions = predicted - (rollout.rewards - rollout.advantages)  # relative to the others of the prompt
        mean = self._moments.get(t, (0.0, 0.0, 0.0))[0]
        corrected = rollout.advantages - self.kappa(t) * (predictions - mean)
        return corrected, BaselineObservation(t, rollout.advantages.tolist(), predictions.tolist())

    def remember(self, observations: Iterable[BaselineObservation]) -> None:
        """Blends the observations of a finished update into the running moments."""
        by_step: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        for seen in observations:
            by_step[seen.t].extend(zip(seen.advantages, seen.predictions, strict=True))
        for t, pairs in by_step.items():
            advantage, prediction = torch.tensor(pairs, dtype=torch.float64).T
            newer = (
                float(prediction.mean()),
                float(prediction.square().mean()),
                float((advantage * prediction).mean()),
            )
            older = self._moments.get(t, newer)
            blended = [self._decay * a + (1 - self._decay) * b for a, b in zip(older, newer, strict=True)]
            self._moments[t] = (blended[0], blended[1], blended[2])

    def state_dict(self) -> dict[str, Any]:
        """The running moments."""
        return {"moments": {t: list(moments) for t, moments in self._moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._moments = {t: (moments[0], moments[1], moments[2]) for t, moments in state["moments"].items()}
