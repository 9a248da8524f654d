"""The plan as text."""

from collections.abc import Sequence

from rlr_peft.evaluation.memory_plan.advice import suggestions
from rlr_peft.evaluation.memory_plan.host import HOST_PHASES, HostPlan, host_plan
from rlr_peft.evaluation.memory_plan.plan import ENCODING, FRAGMENTATION, PHASES, VERIFICATION, MemoryPlan, Part

UNIT = 2**30


def plan_text(plan: MemoryPlan, title: str, gpu_memory: float | None = None, host_memory: float | None = None) -> str:
    """The table of parts and phases, what checkpointing changes, and whether it fits.

    Args:
        plan: what was added up.
        title: what is planned, in words.
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
    lines += ["", f"Peak: {_gib(plan.peak)} GiB, in {plan.peak_phase}.", *_checkpointing(plan)]
    if plan.unknown:
        lines.append(f"Not counted, because nothing is known of their networks: {', '.join(plan.unknown)}.")
    lines += ["", *_rows("peak host memory in GiB", host.parts, HOST_PHASES, width)]
    lines.append(f"{'total':<{width}}" + "".join(f"{_gib(host.total(phase)):>17}" for phase in HOST_PHASES))
    lines += [
        "",
        f"Needs {_gib(host.peak)} GiB of host memory, in {host.peak_phase}. Without a GPU all of it is host memory: "
        f"{_gib(host.without_gpu)} GiB.",
    ]
    if gpu_memory is not None:
        lines += ["", *verdict(plan, gpu_memory)]
    if host_memory is not None:
        lines += ["", host_verdict(host, host_memory)]
    return "\n".join(lines)


def verdict(plan: MemoryPlan, gpu_memory: float) -> list[str]:
    """Whether it fits into so many GiB, and if not what to switch on."""
    if plan.fits(gpu_memory):
        return [f"Fits {gpu_memory:g} GiB, with {_gib(round(gpu_memory * UNIT) - plan.peak)} GiB to spare."]
    steps = suggestions(plan, gpu_memory)
    lines = [f"Does not fit {gpu_memory:g} GiB: {_gib(plan.peak - round(gpu_memory * UNIT))} GiB too much."]
    if steps:
        lines.append("Switch on, each with all before it:")
        lines += [
            f"  {step.flag:<36} -> {_gib(step.plan.peak)} GiB, in {step.plan.peak_phase}"
            f"{': fits' if step.plan.fits(gpu_memory) else ''}"
            for step in steps
        ]
    best = steps[-1].plan if steps else plan
    if not best.fits(gpu_memory):
        lines.append(f"That is not enough: {_what_is_left(best)}")
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


def _what_is_left(plan: MemoryPlan) -> str:
    """What lowers the peak of a plan for which no option is left."""
    if plan.peak_phase in (ENCODING, VERIFICATION):
        return (
            "what is left are weights, such as the text encoders while they encode, which no batch size or resolution "
            "makes smaller; use --mixed_precision bf16, or a larger GPU."
        )
    return (
        "lower --train_batch_size (and raise --gradient_accumulation_steps), --resolution or, of a video, --num_frames "
        "and --decoded_frames; use --mixed_precision bf16; or decode with --pretrained_tiny_vae_name_or_path."
    )


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
        text = f"{what}: {_gib(plain.saved)} on the tape, peak {_gib(plain.peak)}"
        if True in by_choice:
            other = by_choice[True]
            text += f"; with {flag} {_gib(other.saved)} on the tape, peak {_gib(other.peak)}"
        lines.append(f"{text} (GiB).")
    return lines


def _gib(size: int) -> str:
    return f"{size / UNIT:.2f}"
