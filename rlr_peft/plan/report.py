"""The plan as text: the table, whether it fits, and which options bring the peak under a limit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlr_peft.config.reward import model_in
from rlr_peft.plan.parts import (
    ADJOINT,
    DECODE,
    ENCODING,
    EVALUATION,
    FRAGMENTATION,
    HOST_PHASES,
    PHASES,
    HostPlan,
    MemoryPlan,
    Options,
    Part,
    add_up,
    host_plan,
)

UNIT = 2**30


def plan_text(
    plan: MemoryPlan,
    title: str,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    last_resorts: str = "",
) -> str:
    """The table of parts and phases, what checkpointing changes, and whether it fits.

    Args:
        last_resorts: what of the run itself may be made smaller, where no option brings it under the limit.
        gpu_memory: of the GPU in GiB; None gives no verdict.
        host_memory: of the machine in GiB; None gives no verdict.
    """
    host = host_plan(plan)
    width = max(len(part.name) for part in (*plan.parts, *host.parts)) + 2
    lines = [title, "", *_rows("peak GPU memory in GiB", plan.parts, PHASES, width)]
    allowance = f"context + {FRAGMENTATION:.0%} gaps"
    lines.append(
        f"{allowance:<{width}}" + "".join(f"{_gib(plan.total(phase) - plan.tensors(phase)):>17}" for phase in PHASES)
    )
    lines.append(f"{'total':<{width}}" + "".join(f"{_gib(plan.total(phase)):>17}" for phase in PHASES))
    lines += ["", f"Peak: {_gib(plan.peak)} GiB, in {plan.peak_phase}.", *_checkpointing(plan), *_rewards(plan, width)]
    if plan.unknown:
        judged = " (or no config.json was found)" if any(map(model_in, plan.unknown)) else ""
        names = ", ".join(plan.unknown)
        lines.append(f"Not counted, because nothing is known of their networks{judged}: {names}.")
    weights_alone = [name for name, memory in plan.facts.each_reward.items() if memory.weights and not memory.scoring]
    if weights_alone:
        lines.append(f"Counted by their weights alone, without what they need to score: {', '.join(weights_alone)}.")
    lines += ["", *_rows("peak host memory in GiB", host.parts, HOST_PHASES, width)]
    lines.append(f"{'total':<{width}}" + "".join(f"{_gib(host.total(phase)):>17}" for phase in HOST_PHASES))
    lines += [
        "",
        f"Needs {_gib(host.peak)} GiB of host memory{' for each process' if plan.options.shard_denoiser else ''}, in "
        f"{host.peak_phase}. Without a GPU all of it is host memory: "
        f"{_gib(host.without_gpu)} GiB.",
    ]
    if gpu_memory is not None:
        lines += ["", *verdict(plan, gpu_memory, last_resorts)]
    if host_memory is not None:
        lines += ["", host_verdict(host, host_memory)]
    return "\n".join(lines)


def verdict(plan: MemoryPlan, gpu_memory: float, last_resorts: str) -> list[str]:
    """Whether it fits into so many GiB, and if not what to switch on, and what to make smaller."""
    if plan.fits(gpu_memory):
        return [f"Fits {gpu_memory:g} GiB, with {_gib(round(gpu_memory * UNIT) - plan.peak)} GiB to spare."]
    steps = suggestions(plan, gpu_memory)
    lines = [f"Does not fit {gpu_memory:g} GiB: {_gib(plan.peak - round(gpu_memory * UNIT))} GiB too much."]
    if steps:
        lines.append("Switch these on, one after the other, until it fits:")
        lines += [
            f"  {step.flag:<36} -> {_gib(step.plan.peak)} GiB, in {step.plan.peak_phase}"
            f"{': fits' if step.plan.fits(gpu_memory) else ''}"
            for step in steps
        ]
    best = steps[-1].plan if steps else plan
    if best.fits(gpu_memory):
        lines.append(f"All of them: add {' '.join(step.flag for step in steps)} to the command.")
    else:
        lines.append(f"That is not enough: {last_resorts}.")
    return lines


def host_verdict(host: HostPlan, host_memory: float) -> str:
    """Whether the host's share fits into so many GiB, and if not what takes most."""
    if host.fits(host_memory):
        return (
            f"Fits {host_memory:g} GiB of host memory, with {_gib(round(host_memory * UNIT) - host.peak)} GiB to spare."
        )
    largest = max((part for part in host.parts if host.peak_phase in part.phases), key=lambda part: part.size)
    return (
        f"Does not fit {host_memory:g} GiB of host memory: {_gib(host.peak - round(host_memory * UNIT))} GiB too much, "
        f"in {host.peak_phase}. Most of it is '{largest.name}', {_gib(largest.size)} GiB; use --mixed_precision bf16, "
        "leave out what offloads to the host, or take a machine with more memory."
    )


def _rows(title: str, parts: Sequence[Part], phases: Sequence[str], width: int) -> list[str]:
    """The parts' sizes in every phase, under a header."""
    lines = [f"{title:<{width}}" + "".join(f"{phase:>17}" for phase in phases)]
    for part in parts:
        cells = (_gib(part.size) if phase in part.phases else "-" for phase in phases)
        lines.append(f"{part.name:<{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return lines


def _checkpointing(plan: MemoryPlan) -> list[str]:
    measured = plan.facts.measured
    lines = []
    for what, by_choice, flag in (
        ("Denoiser step", measured.step, "gradient_checkpointing"),
        (
            "Decode of one sample",
            {choice: value for (count, choice), value in measured.decode.items() if count == 1},
            "vae_gradient_checkpointing",
        ),
    ):
        plain = by_choice[False]
        if not plain.saved:
            lines.append(f"{what}: peak {_gib(plain.peak)}, without a tape (GiB).")
            continue
        text = f"{what}: {_gib(plain.saved)} on the tape, peak {_gib(plain.peak)}"
        if True in by_choice:
            other = by_choice[True]
            text += f"; with {flag} {_gib(other.saved)} on the tape, peak {_gib(other.peak)}"
        lines.append(f"{text} (GiB).")
    return lines


def _rewards(plan: MemoryPlan, width: int) -> list[str]:
    """What each reward with a network takes."""
    found = {name: memory for name, memory in plan.facts.each_reward.items() if memory.weights}
    if not found:
        return []
    columns = ("weights", "scoring an image")
    lines = ["", f"{'rewards, in GiB':<{width}}" + "".join(f"{column:>17}" for column in columns)]
    for name, memory in found.items():
        scoring = _gib(memory.scoring) if memory.scoring else "not known"
        lines.append(f"{name:<{width}}{_gib(memory.weights):>17}{scoring:>17}")
    return lines


def _gib(size: int) -> str:
    return f"{size / UNIT:.2f}"


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
    if phase == ADJOINT and plan.facts.optimizer[True] < plan.facts.optimizer[False]:
        candidates.append(("--use_8bit_adam", replace(options, use_8bit_adam=True)))
    candidates.append(("--offload_text_encoders", replace(options, offload_text_encoders=True)))
    candidates.append(("--offload_rewards", replace(options, offload_rewards=True)))
    candidates.append(("--offload", replace(options, offload=True)))
    if phase != ENCODING:
        candidates.append(("--bnb_quantization_config_path nf4", replace(options, quantized=True)))
    for flag, changed in candidates:
        if changed != options:
            yield Suggestion(flag, add_up(plan.facts, changed, plan.unknown))
