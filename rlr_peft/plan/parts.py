"""Adds the parts of a training step up, for GPU and host: what is there in each phase, and where the peak is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from rlr_peft.chain.encodings import MAX_JOINED_BYTES, MAX_PROMPT_BYTES
from rlr_peft.lora.proof import VERIFIED_IMAGES
from rlr_peft.plan.measurements import Measurements
from rlr_peft.plan.rewards import RewardMemory

PHASES = ("encoding", "sampling", "decode + reward", "adjoint", "evaluation", "verification")
ENCODING, SAMPLING, DECODE, ADJOINT, EVALUATION, VERIFICATION = PHASES
# What no tensor accounts for: the CUDA context with the libraries' workspaces, and the allocator's rounding and gaps.
CONTEXT_BYTES = 700 * 2**20
FRAGMENTATION = 0.05
# The reward's own decoder, which is no part of the pipeline.
TINY_VAE = "tiny VAE"
# Batches whose joined embeddings are remembered.
KEPT_BATCHES = 4


@dataclass(frozen=True)
class Options:
    """What can be switched on to save memory, as the config spells it, and what the method needs."""

    gradient_checkpointing: bool = False
    vae_gradient_checkpointing: bool = False
    decode_batch_size: int = 1
    offload: bool = False
    offload_text_encoders: bool = False
    offload_rewards: bool = False
    quantized: bool = False
    use_8bit_adam: bool = False
    use_ema: bool = False
    keeps_old_weights: bool = False
    keeps_reference: bool = False
    keeps_best_weights: bool = False
    goes_back: bool = False
    reward_gradient: bool = True
    shard_denoiser: bool = False
    evaluation_batch_size: int = 1

    @property
    def moves_text_encoders(self) -> bool:
        """Whether text encoders wait in host memory and encode block by block."""
        return self.offload or self.offload_text_encoders


@dataclass(frozen=True)
class Facts:
    """Everything measured that a plan is added up from, in bytes.

    Attributes:
        measured: what the phases hold beside weights.
        weights: of each component of the pipeline; ``quantized`` gives those of the denoisers in 4 or 8 bits.
        encoding_block: the largest part of a text encoder that comes to the GPU at once where they are offloaded.
        denoisers: names of the components that are trained.
        quantized: of the denoisers if bitsandbytes holds them.
        sharded: of the denoisers if several processes share their blocks; empty where none do or can.
        denoiser_block: the largest of these blocks, which is there as a whole while it works.
        dequantized: the largest matrix in full width, which is there while it multiplies.
        lora: weights of the adapter in float32.
        optimizer: its state, in float32 (False) and with 8-bit Adam (True).
        rewards: weights of the rewards' networks.
        rewards_at_once: of those that score together: all that are trained on, or one that is held out.
        scoring: the rewards' peak besides, by the number of images scored at once.
        each_reward: of one image, by name; without those about whose networks nothing is known.
        rewards_on_cpu: how many times as much the rewards take without a GPU, where `auto` keeps them in float32.
        compared: images of the evaluation; 0 without one.
        validated: validation images that are drawn together; 0 without them.
        prompt: embeddings of one prompt.
    """

    measured: Measurements
    weights: Mapping[str, int]
    encoding_block: int
    denoisers: tuple[str, ...]
    quantized: Mapping[str, int]
    sharded: Mapping[str, int]
    denoiser_block: int
    dequantized: int
    lora: int
    optimizer: Mapping[bool, int]
    rewards: int
    rewards_at_once: int
    scoring: Mapping[int, int]
    each_reward: Mapping[str, RewardMemory] = field(default_factory=dict)
    rewards_on_cpu: int = 1
    compared: int = 0
    validated: int = 0
    prompt: int = 0


@dataclass(frozen=True)
class Part:
    """One thing that takes memory.

    Attributes:
        name: in words.
        size: in bytes.
        phases: in which it is on the GPU.
    """

    name: str
    size: int
    phases: tuple[str, ...] = PHASES


class Phased(ABC):
    """Parts summed by phases, of which one is the peak."""

    parts: tuple[Part, ...]
    phases: ClassVar[tuple[str, ...]]

    def tensors(self, phase: str) -> int:
        """Bytes of all parts at a phase's peak; on a GPU what `torch.cuda.max_memory_allocated` reports."""
        return sum(part.size for part in self.parts if phase in part.phases)

    @abstractmethod
    def total(self, phase: str) -> int:
        """Bytes that the process takes at a phase's peak, allowances included."""

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes needed."""
        return self.total(self.peak_phase)

    def fits(self, memory: float) -> bool:
        """Whether the peak is within so many GiB."""
        return self.peak <= memory * 2**30

    def as_plain(self) -> dict[str, Any]:
        """The parts and totals as numbers in bytes, for files."""
        return {
            "parts": [{"name": part.name, "bytes": part.size, "phases": list(part.phases)} for part in self.parts],
            "total": {phase: self.total(phase) for phase in self.phases},
        }


@dataclass(frozen=True)
class MemoryPlan(Phased):
    """GPU memory, part by part.

    Attributes:
        options: what is switched on.
        parts: everything counted.
        facts: what else could be chosen.
        unknown: rewards about whose networks nothing is known.
    """

    phases = PHASES
    options: Options
    parts: tuple[Part, ...]
    facts: Facts
    unknown: tuple[str, ...] = ()

    def total(self, phase: str) -> int:
        """Bytes that the process takes of the GPU at a phase's peak, allowances included."""
        return round(self.tensors(phase) * (1 + FRAGMENTATION)) + CONTEXT_BYTES

    def as_plain(self) -> dict[str, Any]:
        return {
            **super().as_plain(),
            "tensors": {phase: self.tensors(phase) for phase in PHASES},
            **{kind: self._steps_and_decodes(kind) for kind in ("saved", "peak")},
            "rewards": {name: asdict(memory) for name, memory in self.facts.each_reward.items()},
        }

    def _steps_and_decodes(self, kind: Literal["saved", "peak"]) -> dict[str, dict[str, int]]:
        """Bytes on the tape (``saved``), or at the ``peak`` of forward and backward, plain and checkpointed."""
        words = {False: "plain", True: "checkpointed"}
        decodes = {choice: tape for (count, choice), tape in self.facts.measured.decode.items() if count == 1}
        return {
            name: {words[choice]: getattr(tape, kind) for choice, tape in tapes.items()}
            for name, tapes in (("denoiser step", self.facts.measured.step), ("decode of one", decodes))
        }


def add_up(facts: Facts, options: Options, unknown: tuple[str, ...] = ()) -> MemoryPlan:
    """The plan of one choice of options.

    Raises:
        KeyError: a choice that was not measured, such as gradient checkpointing of a model that cannot.
    """
    measured = facts.measured
    step = measured.step[options.gradient_checkpointing]
    decode = measured.decode[options.decode_batch_size, options.vae_gradient_checkpointing]
    pixels = options.decode_batch_size * measured.images
    # The reward looks at a float32 copy of the images while the decoder's tape waits; then the tape is unwound.
    scoring = max(decode.peak + pixels, decode.saved + 2 * pixels + facts.scoring[options.decode_batch_size])
    dequantized = facts.dequantized if options.quantized else 0
    parts = [
        *_weights(facts, options),
        Part("block of the denoiser", facts.denoiser_block if options.shard_denoiser else 0),
        Part("LoRA weights (fp32)", facts.lora),
        Part("LoRA gradients (fp32)", facts.lora),
        Part(
            "optimiser state (8 bits)" if options.use_8bit_adam else "optimiser state (fp32)",
            facts.optimizer[options.use_8bit_adam],
        ),
        Part("average of the LoRA weights (fp32)", facts.lora if options.use_ema else 0),
        Part("old copy of the LoRA weights (fp32)", facts.lora if options.keeps_old_weights else 0),
        Part("reference's copy of the LoRA weights (fp32)", facts.lora if options.keeps_reference else 0),
        Part("best LoRA weights (fp32)", facts.lora if options.keeps_best_weights else 0),
        Part("trajectory", measured.trajectory, (SAMPLING, DECODE, ADJOINT)),
        Part(
            "prompt embeddings",
            min(KEPT_BATCHES * measured.embeddings, max(MAX_JOINED_BYTES, 2 * measured.embeddings)),
        ),
        Part("encoding prompts", measured.encoding, (ENCODING,)),
        Part("block of a text encoder", facts.encoding_block if options.moves_text_encoders else 0, (ENCODING,)),
        Part("denoiser step, no tape", measured.sampling + dequantized, (SAMPLING,)),
        Part(f"VAE decode + reward, {'tape' if options.reward_gradient else 'no tape'}", scoring, (DECODE,)),
        Part("denoiser step, tape", step.peak + dequantized, (ADJOINT,)),
        Part("summed LoRA gradients", 2 * facts.lora, (ADJOINT,)),
        *_evaluation(facts, options),
        *_verification(facts, options),
    ]
    if options.offload_rewards:
        parts.append(Part("reward networks at work", facts.rewards_at_once, (DECODE,)))
    else:
        parts.append(Part("reward networks", facts.rewards))
    return MemoryPlan(options, tuple(part for part in parts if part.size), facts, unknown)


def _evaluation(facts: Facts, options: Options) -> list[Part]:
    """Drawing images to look at: its denoiser steps and its decode, of which the larger counts."""
    measured = facts.measured.evaluation
    if not measured:
        return []
    count = min(options.evaluation_batch_size, max(measured))
    sampling, decode = measured[count]
    if options.offload:  # weights of the one at work; the reward has the images after the decode
        denoiser = max(0 if options.quantized else facts.weights[name] for name in facts.denoisers)
        sampling, decode = sampling + denoiser, decode + facts.weights.get("vae", 0)
    pixels = count * facts.measured.images
    scoring = facts.rewards_at_once + pixels if options.offload_rewards else 0
    return [Part(f"drawing {count} at once, no tape", max(sampling, decode + pixels, scoring), (EVALUATION,))]


def _verification(facts: Facts, options: Options) -> list[Part]:
    """Proving the saved adapter: it is loaded beside the trained one, and both draw the same images in turn."""
    measured = facts.measured
    vae = facts.weights.get("vae", 0)
    sampling, decode = measured.verification
    sampling += facts.dequantized if options.quantized else 0
    decode += VERIFIED_IMAGES * measured.picture  # the other adapter's images wait
    if options.offload:
        denoiser = max(0 if options.quantized else facts.weights[name] for name in facts.denoisers)
        sampling, decode = sampling + denoiser, decode + vae
    encoding = measured.encoding + (facts.encoding_block if options.moves_text_encoders else 0)
    drawing = max(encoding, sampling, decode)
    return [
        Part(f"drawing {VERIFIED_IMAGES} to compare", drawing, (VERIFICATION,)),
        Part("reloaded adapter", facts.lora, (VERIFICATION,)),
    ]


def text_encoders(facts: Facts) -> dict[str, int]:
    """Bytes of each text encoder."""
    return {name: size for name, size in facts.weights.items() if name.startswith("text_encoder")}


def host_weights(facts: Facts, options: Options) -> int:
    """Bytes of the pipeline's models that are loaded by way of the host: all but what bitsandbytes holds."""
    held = facts.denoisers if options.quantized else ()
    return sum(size for name, size in facts.weights.items() if name not in held and name != TINY_VAE)


def _weights(facts: Facts, options: Options) -> list[Part]:
    parts = []
    encoders = text_encoders(facts)
    for name, size in facts.weights.items():
        phases: tuple[str, ...] = PHASES
        is_denoiser = name in facts.denoisers
        if is_denoiser and options.quantized:
            size = facts.quantized[name]  # and stays: bitsandbytes' layers are not moved
        elif is_denoiser and options.shard_denoiser:
            size = facts.sharded[name]
        elif is_denoiser and options.offload:
            largest = max(facts.denoisers, key=lambda other: facts.weights[other])
            phases = (SAMPLING, ADJOINT) if name == largest else ()  # of two experts one at a time
        elif name == "vae" and options.offload:
            phases = (DECODE,)
        elif name in encoders and options.moves_text_encoders:
            phases = ()
        parts.append(Part(f"weights: {name}", size, phases))
    return parts


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
class HostPlan(Phased):
    """Host memory beside a GPU, part by part.

    Attributes:
        parts: everything counted; phases are those of `HOST_PHASES`.
        without_gpu: bytes of the whole process where there is no GPU.
    """

    phases = HOST_PHASES
    parts: tuple[Part, ...]
    without_gpu: int

    def total(self, phase: str) -> int:
        """Bytes at a phase's peak: no allowance."""
        return self.tensors(phase)

    def as_plain(self) -> dict[str, Any]:
        return {**super().as_plain(), "without GPU": self.without_gpu}


def host_plan(plan: MemoryPlan) -> HostPlan:
    """The host's share of a plan."""
    libraries = [Part("interpreter and libraries", LIBRARIES_BYTES, HOST_PHASES), Part("CUDA", CUDA_BYTES, HOST_PHASES)]
    return HostPlan((*libraries, *_kept_on_host(plan)), _without_gpu(plan))


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
    remembered = min(REMEMBERED_PROMPTS * facts.prompt, max(MAX_PROMPT_BYTES, facts.prompt))
    old_weights = facts.lora if options.keeps_old_weights else 0
    state = facts.lora + facts.optimizer[options.use_8bit_adam] + old_weights
    parts = (
        # rewards come after the pipeline, of which what rests on the host is still there
        Part("weights while they are loaded", max(pipeline, resting + facts.rewards), (LOADING,)),
        Part("offloaded models", resting, after_loading),
        Part("offloaded rewards", facts.rewards if options.offload_rewards else 0, after_loading),
        Part(f"embeddings of {REMEMBERED_PROMPTS} prompts", remembered, after_loading),
        # the best state so far, and the sum of the weights since; a checkpoint or the next best state is made beside it
        Part("state to go back to", state + facts.lora if options.goes_back else 0, after_loading),
        Part("checkpoint while it is written", state, (TRAINING,)),
        # one by one, joined, and as an image file's numbers
        Part("validation images", 3 * facts.validated * picture, (TRAINING, EVALUATION)),
        Part("images of the base", pictures, after_loading),
        Part("images of the adapter", pictures, (EVALUATION, VERIFICATION)),
    )
    return tuple(part for part in parts if part.size)


def _without_gpu(plan: MemoryPlan) -> int:
    """Bytes where both halves are in host memory, so that what only moves between them is there once."""
    here = replace(plan.options, offload_text_encoders=False, offload_rewards=False)
    factor, facts = plan.facts.rewards_on_cpu, plan.facts
    scoring = {count: factor * size for count, size in facts.scoring.items()}
    plan = add_up(replace(facts, rewards=factor * facts.rewards, scoring=scoring), here)
    kept = _kept_on_host(plan)

    def beside(phase: str) -> int:
        host_phase = phase if phase in HOST_PHASES else TRAINING
        return sum(part.size for part in kept if host_phase in part.phases)

    most = max(round(plan.tensors(phase) * (1 + FRAGMENTATION)) + beside(phase) for phase in PHASES)
    loading = sum(part.size for part in kept if LOADING in part.phases)
    return LIBRARIES_BYTES + max(most, loading)
