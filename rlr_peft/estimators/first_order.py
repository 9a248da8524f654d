"""First order (FO): the pathwise gradient through the last K steps of the chain."""

from dataclasses import replace

import torch

from rlr_peft.chain.adjoint import Segment
from rlr_peft.estimators.rollout import Rollout


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
    return Segment(first_step=1, length=num_steps, cotangent=rollout.reward_gradient, weight=weight)


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

    def into_parameters(t: int, mean: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        share = float(mixture[t - 1])
        if share == 1 and first_order == 1:
            return cotangent
        mixed = first_order * share * cotangent
        return mixed if share == 1 else mixed + half_order * (1 - share) * rollout.score_cotangent(t)

    segment = first_order_segment(rollout, len(mixture))
    return replace(segment, into_parameters=into_parameters)
