"""Measures, step by step, how noisy the pathwise and the score-function gradient are.

Pathwise gradients grow towards the noise, because the chain amplifies; score terms shrink, because the steps are
noisier there. Where they cross depends on the model, T and the reward, so it is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlr_peft.chain.adjoint import pull_back
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.rollout import Rollout


@dataclass(frozen=True)
class StepVariances:
    """Variance (trace of the covariance) of a single sample's gradient through every step.

    Attributes:
        first_order: V_G(t) at index t - 1, (T,), float64; infinite without a reward gradient.
        half_order: V_H(t) at index t - 1, (T,), float64; infinite where the step has no noise.
    """

    first_order: torch.Tensor
    half_order: torch.Tensor

    def blend(self, newer: "StepVariances", decay: float) -> "StepVariances":
        """Running mean: ``decay`` times this plus ``1 - decay`` times the newer measurement."""
        return StepVariances(
            _blend(self.first_order, newer.first_order, decay), _blend(self.half_order, newer.half_order, decay)
        )


def measure_step_variances(chain: Chain, rollouts: Sequence[Rollout]) -> StepVariances:
    """V_G and V_H over the samples of some rollouts; costs two replays per sample and step, one sample at a time.

    Raises:
        ValueError: fewer than two samples.
    """
    samples = [rollout.select([i]) for rollout in rollouts for i in range(len(rollout.rewards))]
    if len(samples) < 2:
        raise ValueError(f"Expected at least 2 samples to measure a variance, got {len(samples)}.")
    cotangents = [sample.reward_gradient for sample in samples]
    num_steps = chain.num_steps
    first_order = torch.full((num_steps,), torch.inf, dtype=torch.float64)
    half_order = first_order.clone()
    for t in range(1, num_steps + 1):
        if cotangents[0] is not None:
            moments = _Moments()
            for i, sample in enumerate(samples):
                cotangent = cotangents[i]
                assert cotangent is not None
                gradients, cotangents[i] = pull_back(chain, sample.trajectory, t, cotangent, into_latents=t < num_steps)
                moments.add(gradients)
            first_order[t - 1] = moments.variance()
        if chain.std(t) > 0:
            moments = _Moments()
            for sample in samples:
                gradients, _ = pull_back(chain, sample.trajectory, t, sample.score_cotangent(t), into_latents=False)
                moments.add(gradients)
            half_order[t - 1] = moments.variance()
    return StepVariances(first_order, half_order)


class _Moments:
    """Trace of the sample covariance of a stream of vectors (Welford's update)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: torch.Tensor | None = None
        self._squares = 0.0

    def add(self, gradients: list[torch.Tensor]) -> None:
        vector = torch.cat([gradient.flatten() for gradient in gradients])
        self._count += 1
        if self._mean is None:
            self._mean = torch.zeros_like(vector)
        before = vector - self._mean
        self._mean += before / self._count
        self._squares += float(torch.dot(before, vector - self._mean))

    def variance(self) -> float:
        return self._squares / (self._count - 1)


def _blend(older: torch.Tensor, newer: torch.Tensor, decay: float) -> torch.Tensor:
    return torch.where(newer.isinf() | older.isinf(), newer, decay * older + (1 - decay) * newer)
