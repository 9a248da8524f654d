"""Which options bring the peak under a limit: each where it acts, until it fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlr_peft.evaluation.memory_plan.plan import ADJOINT, DECODE, ENCODING, EVALUATION, MemoryPlan, Options, add_up


@dataclass(frozen=True)
class Suggestion:
    """One more option.

    Attributes:
        flag: as typed.
        plan: with this and all suggestions before.
    """

    flag: str
    plan: MemoryPlan


def suggestions(plan: MemoryPlan, gpu_memory: float) -> list[Suggestion]:
    """Options to switch on, one after the other, each of which lowers the peak; the last one fits, if any does.

    Args:
        plan: as configured.
        gpu_memory: in GiB.
    """
    taken: list[Suggestion] = []
    while not plan.fits(gpu_memory):
        better = next((found for found in _alternatives(plan) if found.plan.peak < plan.peak - 2**20), None)
        if better is None:
            break
        taken.append(better)
        plan = better.plan
    return taken


def _alternatives(plan: MemoryPlan) -> Iterator[Suggestion]:
    """The options that act on the phase of the peak, the cheapest in time first."""
    options, measured = plan.options, plan.facts.measured
    phase = plan.peak_phase
    candidates: list[tuple[str, Options]] = []
    if phase == DECODE:
        if options.decode_batch_size > 1:
            candidates.append(("--decode_batch_size 1", replace(options, decode_batch_size=1)))
        if (1, True) in measured.decode:
            candidates.append(("--vae_gradient_checkpointing", replace(options, vae_gradient_checkpointing=True)))
    if phase == EVALUATION:
        candidates.append(("--evaluation_batch_size 1", replace(options, evaluation_batch_size=1)))
    if phase == ADJOINT and True in measured.step:
        candidates.append(("--gradient_checkpointing", replace(options, gradient_checkpointing=True)))
    if phase == ADJOINT:
        candidates.append(("--use_8bit_adam", replace(options, use_8bit_adam=True)))
    candidates.append(("--offload", replace(options, offload=True)))
    if phase != ENCODING:
        candidates.append(("--bnb_quantization_config_path (NF4)", replace(options, quantized=True)))
    for flag, changed in candidates:
        if changed != options:
            yield Suggestion(flag, add_up(plan.facts, changed, plan.unknown))
