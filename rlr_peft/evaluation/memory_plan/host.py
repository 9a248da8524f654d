"""What a run holds in host memory: beside a GPU, and where there is none."""

from dataclasses import dataclass, replace
from typing import Any

from rlr_peft.evaluation.memory_plan.plan import (
    EVALUATION,
    FRAGMENTATION,
    PHASES,
    VERIFICATION,
    MemoryPlan,
    Part,
    add_up,
    host_weights,
    text_encoders,
)

LOADING, TRAINING = "loading", "training"
HOST_PHASES = (LOADING, TRAINING, EVALUATION, VERIFICATION)
# Interpreter and libraries: measured on Linux at the end of a run of tiny-shapes on the CPU, with torch for the CPU.
LIBRARIES_BYTES = 690 * 2**20
# CUDA's libraries and context on the host; assumed, not measured.
CUDA_BYTES = 2 * 2**30
# Prompts whose embeddings are remembered.
REMEMBERED_PROMPTS = 256
# Images of base and of adapter that are kept in float32 for a figure; all are kept as small files for the page.
FIGURE_PAIRS = 12
# A file of a picture against its pixels in float32: at most a byte where those are four.
BYTES_OF_PICTURE = 1 / 4


@dataclass(frozen=True)
class HostPlan:
    """Host memory beside a GPU, part by part.

    Attributes:
        parts: everything counted; phases are those of `HOST_PHASES`.
        without_gpu: bytes of the whole process where there is no GPU.
    """

    parts: tuple[Part, ...]
    without_gpu: int

    def total(self, phase: str) -> int:
        """Bytes at a phase's peak."""
        return sum(part.size for part in self.parts if phase in part.phases)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(HOST_PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes needed beside a GPU."""
        return self.total(self.peak_phase)

    def fits(self, host_memory: float) -> bool:
        """Whether the peak is within so many GiB."""
        return self.peak <= host_memory * 2**30


def host_plan(plan: MemoryPlan) -> HostPlan:
    """The host's share of a plan."""
    libraries = [Part("interpreter and libraries", LIBRARIES_BYTES, HOST_PHASES), Part("CUDA", CUDA_BYTES, HOST_PHASES)]
    return HostPlan((*libraries, *_kept_on_host(plan)), _without_gpu(plan))


def as_plain(plan: HostPlan) -> dict[str, Any]:
    """The plan as numbers in bytes, for files."""
    return {
        "parts": [{"name": part.name, "bytes": part.size, "phases": list(part.phases)} for part in plan.parts],
        "total": {phase: plan.total(phase) for phase in HOST_PHASES},
        "without GPU": plan.without_gpu,
    }


def _kept_on_host(plan: MemoryPlan) -> tuple[Part, ...]:
    """What is there on purpose, or on its way to the GPU."""
    facts, options = plan.facts, plan.options
    pipeline = host_weights(facts, options)
    resting = 0
    if options.offload:
        resting = pipeline
    elif options.offload_text_encoders:
        resting = sum(text_encoders(facts).values())
    after_loading = (TRAINING, EVALUATION, VERIFICATION)
    picture = facts.measured.picture
    pictures = round(picture * (min(facts.compared, FIGURE_PAIRS) + facts.compared * BYTES_OF_PICTURE))
    parts = (
        # rewards come after the pipeline, of which what rests on the host is still there
        Part("weights while they are loaded", max(pipeline, resting + facts.rewards), (LOADING,)),
        Part("offloaded models", resting, after_loading),
        Part("offloaded rewards", facts.rewards if options.offload_rewards else 0, after_loading),
        Part(f"embeddings of {REMEMBERED_PROMPTS} prompts", REMEMBERED_PROMPTS * facts.prompt, after_loading),
        Part("checkpoint while it is written", facts.lora + facts.optimizer[options.use_8bit_adam], (TRAINING,)),
        # one by one, joined, and as an image file's numbers
        Part("validation images", 3 * facts.validated * picture, (TRAINING, EVALUATION)),
        Part("images of the base", pictures, after_loading),
        Part("images of the adapter", pictures, (EVALUATION, VERIFICATION)),
        Part("second pipeline, for the proof", pipeline + facts.lora, (VERIFICATION,)),
    )
    return tuple(part for part in parts if part.size)


def _without_gpu(plan: MemoryPlan) -> int:
    """Bytes where both halves are in host memory, so that what only moves between them is there once."""
    here = replace(plan.options, offload_text_encoders=False, offload_rewards=False)
    plan = add_up(plan.facts, here)
    kept = _kept_on_host(plan)

    def beside(phase: str) -> int:
        host_phase = phase if phase in HOST_PHASES else TRAINING
        return sum(part.size for part in kept if host_phase in part.phases)

    most = max(round(plan.tensors(phase) * (1 + FRAGMENTATION)) + beside(phase) for phase in PHASES)
    return LIBRARIES_BYTES + most
