"""Chooses K and h: from measured variances, a compute budget or a memory budget."""

import math

import torch

# A weight this close to 0 or 1 is not worth a second backward pass.
NEGLIGIBLE_WEIGHT = 0.01

# A K below T must promise at least this factor: from few samples both sums are rough, a score term that was taken for
# quiet costs far more than a pathwise one that was, and score terms grow with rewards that the samples did not show.
WORTH_LEAVING_FULL = 2.0


def best_first_order_steps(
    first_order: torch.Tensor, half_order: torch.Tensor, worth_leaving_full: float = WORTH_LEAVING_FULL
) -> int:
    """The K in 0..T with the smallest sum of variances if steps 1..K are first order and the rest half order.

    Every step costs one denoiser evaluation and one backward pass, whatever its term, so variance alone decides. The
    whole estimate's variance would be the better criterion if it were known: the terms of different steps are
    correlated. Measured on few samples it is noisier than the two sums, whose errors go together, and chose worse.

    Args:
        first_order: V_G(t) at index t - 1, (T,); infinite without a reward gradient.
        half_order: V_H(t) at index t - 1, (T,); infinite where a step has no noise.
        worth_leaving_full: factor by which a smaller K must lower the sum.

    Returns:
        K; T unless a smaller K lowers the sum by that factor.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    pathwise = torch.cat([zero, first_order.double().cumsum(0)])
    score = torch.cat([half_order.double().flip(0).cumsum(0).flip(0), zero])
    sums = (pathwise + score).nan_to_num(nan=torch.inf, posinf=torch.inf)
    best = int(sums.argmin())
    return best if worth_leaving_full * sums[best] < sums[-1] else len(first_order)


def inverse_variance_weights(first_order: torch.Tensor, half_order: torch.Tensor) -> torch.Tensor:
    """``w_t = V_H / (V_G + V_H)``, the weight of the pathwise term of every step; ``1 - w_t`` is the score term's.

    Args:
        first_order: V_G(t) at index t - 1, (T,).
        half_order: V_H(t) at index t - 1, (T,); infinite where a step has no noise.

    Returns:
        (T,), float64, in [0, 1]; weights next to 0 or 1 are rounded.
    """
    weights = torch.where(half_order.isinf(), 1.0, half_order / (first_order + half_order).clamp(min=1e-300)).double()
    weights[weights < NEGLIGIBLE_WEIGHT] = 0.0
    weights[weights > 1 - NEGLIGIBLE_WEIGHT] = 1.0
    return weights


def half_order_length_for_compute(
    nfe_budget: float, num_steps: int, first_order_steps: int, num_blocks: int, zeroth_order_evaluations: int
) -> int:
    """The longest block that a compute budget allows, at least 1.

    Args:
        nfe_budget: denoiser evaluations per sample and update.
        num_steps: T, spent on sampling.
        first_order_steps: K, replayed by the first-order term.
        num_blocks: M, half-order blocks per update.
        zeroth_order_evaluations: denoiser evaluations of the zeroth-order term.

    Raises:
        ValueError: the budget does not even allow h = 1.
    """
    fixed = num_steps + first_order_steps + zeroth_order_evaluations
    length = math.floor((nfe_budget - fixed) / num_blocks)
    if length < 1:
        raise ValueError(
            f"Expected nfe_budget >= {fixed + num_blocks} (sampling {num_steps}, first order {first_order_steps}, "
            f"zeroth order {zeroth_order_evaluations}, one step for each of {num_blocks} blocks), got {nfe_budget}."
        )
    return max(1, min(length, num_steps - first_order_steps))


def half_order_length_for_memory(
    memory_budget: float, half_order_step: float, zeroth_order_step: float, num_steps: int
) -> int:
    """The paper's budget rule ``h* = floor((B - B_z (T - 1)) / (B_h - B_z))``, within 1..T - 1 (1 for T = 1).

    It is about a tape that holds all h steps. Ours holds one (see ``rlr_peft.chain.adjoint``), so memory never forces a
    small h here; the rule is kept for comparison with the paper, whose second bound never acts.

    Args:
        memory_budget: B in GB.
        half_order_step: B_h, GB per half-order step on the tape.
        zeroth_order_step: B_z, GB per zeroth-order step.
        num_steps: T.

    Raises:
        ValueError: the budget does not allow h = 1.
    """
    length = math.floor((memory_budget - zeroth_order_step * (num_steps - 1)) / (half_order_step - zeroth_order_step))
    if length < 1:
        needed = half_order_step + zeroth_order_step * (num_steps - 2)
        raise ValueError(f"Expected memory_budget >= {needed:.2f} GB for h = 1, got {memory_budget} GB.")
    return max(1, min(length, num_steps - 1))
