"""First order (FO): the pathwise gradient of the reward, through the last K steps of the chain or one prediction."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from rlr_peft.chain.adjoint import Segment
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.base import FIRST_ORDER, MIXED_ORDER, Coverage, CoverageError, Estimator, Rollout
from rlr_peft.estimators.objective import Objective


def first_order_segment(rollout: Rollout, num_steps: int, weight: float = 1.0) -> Segment:
    """The gradient of R(x_0) through steps 1..K with x_K held fixed; exact for those steps.

    K = T is full backpropagation; a small K alone is truncated backpropagation (DRaFT-K, AlignProp).

    Args:
        rollout: must hold the reward's gradient.
        num_steps: K >= 1.
        weight: factor of the gradient.

    Raises:
        ValueError: the reward has no gradient.
    """
    if rollout.reward_gradient is None:
        raise ValueError("Expected a differentiable reward for first-order steps, got one without gradient.")
    return Segment(FIRST_ORDER, 1, num_steps, rollout.reward_gradient, weight)


def mixed_segment(
    rollout: Rollout, mixture: torch.Tensor, first_order: float = 1.0, half_order: float = 1.0
) -> Segment:
    """First and half order mixed in one walk: ``w_t c_t + (1 - w_t) A eps_t / sigma_t`` goes into the parameters.

    The pathwise cotangent c_t travels on as ever, so both parts of every step are exact and cover it with weight 1.

    Args:
        rollout: must hold the reward's gradient.
        mixture: w_t of steps 1..K, (K,), in [0, 1]; 1 where a step has no noise.
        first_order: coefficient of the pathwise parts.
        half_order: coefficient of the score parts.
    """

    def into_parameters(
        t: int, mean: torch.Tensor, cotangent: torch.Tensor | None
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        assert cotangent is not None  # it starts as the reward's gradient
        share = float(mixture[t - 1])
        if share == 1 and first_order == 1:
            return cotangent, {}
        mixed = first_order * share * cotangent
        return (mixed if share == 1 else mixed + half_order * (1 - share) * rollout.score_cotangent(t)), {}

    return replace(
        first_order_segment(rollout, len(mixture)),
        term=MIXED_ORDER,
        into_parameters=into_parameters,
        score_steps=tuple(int(i) + 1 for i in (mixture < 1).nonzero()),
    )


class RewardFeedbackEstimator(Estimator):
    """ReFL: the reward of the image that the denoiser predicts at one random late step, through that step.

    It costs one replay, whatever T, but raises the reward of predictions, not of images (Xu et al., "ImageReward",
    2023). The step is drawn evenly from the last ones for every micro-batch; advantages are for the logs alone.

    Args:
        last_steps: K, the step is one of 1..K; None for the last quarter of the chain.
    """

    uses_reward_gradient = True

    def __init__(self, last_steps: int | None = None) -> None:
        self.last_steps = last_steps

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards."""
        last = "quarter of the steps" if self.last_steps is None else f"{self.last_steps} step(s)"
        return f"reward of the image predicted at a random one of the last {last}"

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """No step of the image's own gradient is covered.

        Raises:
            CoverageError: the reward has no gradient.
        """
        if not has_gradient:
            raise CoverageError(
                "Expected a differentiable reward for refl, got one without gradient. Use --estimator rlr."
            )
        count = self._count(chain)
        return Coverage(
            torch.zeros(chain.num_steps, dtype=torch.float64),
            {},
            departures=(f"the reward of the image predicted at one of steps 1-{count} stands in for the image's",),
        )

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, generator: torch.Generator
    ) -> Iterator[Segment]:
        """One step, differentiated at its prediction of x_0."""
        trajectory = rollout.trajectory
        t = int(torch.randint(1, self._count(chain) + 1, (1,), generator=generator))
        _, cotangent = objective.score_with_gradient(trajectory.pred_original_samples[t - 1], trajectory.prompts)
        yield Segment("reward_feedback", t, 1, cotangent, of="pred_original_sample")

    def _count(self, chain: Chain) -> int:
        return self.last_steps or math.ceil(chain.num_steps / 4)
