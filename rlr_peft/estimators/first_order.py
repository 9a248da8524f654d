"""First order (FO): the pathwise gradient through the last K steps of the chain."""

from rlr_peft.chain.adjoint import Segment
from rlr_peft.estimators.rollout import Rollout


def first_order_segment(rollout: Rollout, num_steps: int) -> Segment:
    """The gradient of R(x_0) through steps 1..K with x_K held fixed; exact for those steps.

    K = T is full backpropagation; a small K alone is truncated backpropagation (DRaFT-K, AlignProp).

    Args:
        rollout: must hold the reward's gradient.
        num_steps: K >= 1.

    Raises:
        ValueError: the reward has no gradient.
    """
    if rollout.reward_gradient is None:
        raise ValueError("Expected a differentiable reward for first-order steps, got one without gradient.")
    return Segment(first_step=1, length=num_steps, cotangent=rollout.reward_gradient)
