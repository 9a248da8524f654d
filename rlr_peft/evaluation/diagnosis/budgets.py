"""The length h of half-order blocks that a compute or a memory budget of the config allows."""

from collections.abc import Iterator

from rlr_peft.config.estimator import ThreeOrdersArguments
from rlr_peft.estimators.planning import half_order_length_for_compute, half_order_length_for_memory
from rlr_peft.evaluation.diagnosis.diagnosis import Diagnosis, MethodResult

BYTES_PER_GB = 1e9


def budget_advice(diagnosis: Diagnosis) -> Iterator[str]:
    """Sentences on h; none where the config has no budget."""
    arguments = diagnosis.config.estimator
    if not isinstance(arguments, ThreeOrdersArguments):
        return
    if arguments.nfe_budget is None and arguments.memory_budget is None:
        return
    if arguments.nfe_budget is not None:
        yield _compute_advice(diagnosis, arguments, arguments.nfe_budget)
    if arguments.memory_budget is not None:
        yield _memory_advice(diagnosis, arguments.memory_budget)
    ratio = _variance_of_longer_blocks(diagnosis)
    if ratio is not None:
        yield (
            f"With blocks of h = 2 the whole estimate has {ratio:.1f} times the variance that it has with the single "
            "steps that they replace: a longer block pays only where it takes steps from the zeroth order."
        )


def _compute_advice(diagnosis: Diagnosis, arguments: ThreeOrdersArguments, budget: float) -> str:
    num_steps = diagnosis.evidence.num_steps
    tail = diagnosis.comparison.first_order_steps
    if tail == num_steps:
        return f"nfe_budget {budget:g}: K = {tail} leaves no step for a block, so h does not matter."
    blocks = arguments.ho_blocks if isinstance(arguments.ho_blocks, int) else 1
    if blocks == 0:
        return f"nfe_budget {budget:g}: with ho_blocks 0 there is no block, so h does not matter."
    try:
        length = half_order_length_for_compute(budget, num_steps, tail, blocks, arguments.zo_chains * num_steps)
    except ValueError as error:
        return f"nfe_budget {budget:g} does not even allow h = 1. {error}"
    return (
        f"nfe_budget {budget:g} with K = {tail} and {blocks} block(s) allows `--ho_length {length}` "
        f"(`--fo_steps {tail} --ho_blocks {blocks}`)."
    )


def _memory_advice(diagnosis: Diagnosis, budget: float) -> str:
    half, zeroth = _step_memory(diagnosis, "reinforce"), _step_memory(diagnosis, "zeroth order on all steps")
    if half is None or zeroth is None or half <= zeroth:
        return f"memory_budget {budget:g} GB: the memory rule needs score terms that take more than the zeroth order."
    constants = f"`--ho_step_memory {half:.3g} --zo_step_memory {zeroth:.3g}`, as measured here for a micro-batch"
    try:
        length = half_order_length_for_memory(budget, half, zeroth, diagnosis.evidence.num_steps)
    except ValueError as error:
        return f"memory_budget {budget:g} GB does not even allow h = 1 with {constants}. {error}"
    return (
        f"memory_budget {budget:g} GB allows `--ho_length {length}` by the paper's rule with {constants}. That rule is "
        "about a tape of h steps; ours holds one step for every h."
    )


def _step_memory(diagnosis: Diagnosis, name: str) -> float | None:
    """GB that one step takes for a whole micro-batch of training."""
    result = _find(diagnosis, name)
    if result is None:
        return None
    scale = diagnosis.config.training.train_batch_size / diagnosis.cost_samples
    return result.cost.added_bytes * scale / BYTES_PER_GB


def _variance_of_longer_blocks(diagnosis: Diagnosis) -> float | None:
    pairs = (
        ("rlr, K = 1, blocks of h = 2", "rlr, K = 1"),
        ("rlr, no black-box tail, blocks of h = 2", "reinforce"),
    )
    for longer, single in pairs:
        first, second = _find(diagnosis, longer), _find(diagnosis, single)
        if first is not None and second is not None:
            return first.estimates.variance / second.estimates.variance
    return None


def _find(diagnosis: Diagnosis, name: str) -> MethodResult | None:
    return next((result for result in diagnosis.results if result.method.name == name), None)
