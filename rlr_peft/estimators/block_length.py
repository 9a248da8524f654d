"""How long the half-order blocks of the paper's form may be, by a budget of compute or of memory."""

import math

from rlr_peft.config.estimator import ThreeOrdersArguments


def half_order_length(arguments: ThreeOrdersArguments, num_inference_steps: int) -> int:
    """The given length; or, `auto`, the longest that all given budgets allow.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
    """
    if arguments.ho_length != "auto":
        return arguments.ho_length
    fo_steps, blocks, lengths = arguments.fo_steps, arguments.ho_blocks, []
    if arguments.nfe_budget is not None:
        if blocks == "all" or fo_steps == "auto":
            raise ValueError(
                "Expected numbers for ho_blocks and fo_steps beside ho_length auto and nfe_budget, got "
                f"ho_blocks = {blocks} and fo_steps = {fo_steps}: tiling every step costs the same for every "
                "length, and a measured K is not known beforehand. Set both, or use --estimator rlr-paper."
            )
        evaluations = arguments.zo_chains * num_inference_steps
        lengths.append(
            half_order_length_for_compute(arguments.nfe_budget, num_inference_steps, fo_steps, blocks, evaluations)
        )
    if arguments.memory_budget is not None:
        assert arguments.ho_step_memory is not None and arguments.zo_step_memory is not None  # the config's checks
        lengths.append(
            half_order_length_for_memory(
                arguments.memory_budget, arguments.ho_step_memory, arguments.zo_step_memory, num_inference_steps
            )
        )
    return min(lengths)


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
