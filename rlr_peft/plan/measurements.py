"""Bytes, without holding them: of the phases of a training step at their peaks, and of weights."""

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from rlr_peft.byte_counters import LiveMemory, counted_tape, fused_attention
from rlr_peft.chain.adjoint import ReplayedStep
from rlr_peft.chain.denoising_chain import DenoisingChain
from rlr_peft.chain.steps import Trajectory
from rlr_peft.lora.proof import VERIFIED_IMAGES
from rlr_peft.prompt import ConditionImage, Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Differentiated:
    """Bytes of a forward and backward pass, or of a forward pass alone; weights and inputs do not count.

    Attributes:
        saved: on autograd's tape between the two; 0 without a backward pass.
        peak: the most at any moment.
    """

    saved: int
    peak: int


@dataclass(frozen=True)
class Measurements:
    """What the phases hold beside the weights, in bytes.

    Attributes:
        trajectory: latents, noises and predictions of one micro-batch.
        embeddings: of its prompts, which stay.
        encoding: peak while its prompts are encoded.
        sampling: peak of one denoiser step without a tape.
        step: of one denoiser step with a tape, plain (False) and checkpointed (True).
        decode: of the VAE's decode for the reward, by its number of samples and whether it is checkpointed.
        images: one sample's decoded pixels in float32.
        evaluation: peak of drawing images to look at, by their number: of a denoiser step and of the decode, without a
            tape; empty where nothing is drawn.
        verification: the same of the images that prove the saved adapter.
        picture: pixels of one image or video to look at, in float32.
    """

    trajectory: int
    embeddings: int
    encoding: int
    sampling: int
    step: Mapping[bool, Differentiated]
    decode: Mapping[tuple[int, bool], Differentiated]
    images: int
    evaluation: Mapping[int, tuple[int, int]]
    verification: tuple[int, int]
    picture: int


def measure(
    chain: DenoisingChain,
    batch_size: int,
    decode_batch_size: int,
    looking: DenoisingChain,
    evaluation_batch_size: int | None = None,
    from_images: bool = False,
    reward_gradient: bool = True,
    guided: bool = True,
) -> Measurements:
    """Measures a chain whose pipeline is on the meta device; its gradient checkpointing is left switched off.

    Args:
        decode_batch_size: samples that are decoded at once.
        looking: the chain that draws images to look at, over the same pipeline.
        evaluation_batch_size: how many it draws at once for an evaluation; None where there is none.
        from_images: whether samples are drawn from pictures.
        reward_gradient: whether the decode is differentiated; without, it leaves no tape.
        guided: whether a differentiated step has guidance.
    """
    prompts = blank_prompts(batch_size, from_images)
    counts = {VERIFIED_IMAGES} if evaluation_batch_size is None else {VERIFIED_IMAGES, 1, evaluation_batch_size}
    denoisers = [getattr(chain.pipeline, name) for name in chain.family.denoisers]
    decoder = chain.reward_decoder or getattr(chain.pipeline, "vae", None)
    with (
        fused_attention(),
        tqdm(desc="Planning memory", bar_format="{desc}: {n_fmt} phases done [{elapsed}]", leave=False) as bar,
    ):

        def counted(found: T) -> T:
            bar.update()
            return found

        with LiveMemory() as memory:
            chain.encode(prompts)
        encoding, embeddings = memory.peak, memory.live
        trajectory = blank_trajectory(chain, prompts)
        sampling = counted(_sampling(chain, trajectory))
        drawn = {count: counted(_drawing(looking, blank_prompts(count, from_images))) for count in counts}
        with nullcontext() if guided else chain.without_guidance():
            step = {
                checkpointed: counted(differentiated_step(chain, trajectory)) for checkpointed in _variants(denoisers)
            }
        decode = {
            (count, checkpointed): counted(_decode(chain, trajectory, count, reward_gradient))
            for checkpointed in _variants([decoder])
            for count in sorted({1, decode_batch_size})
        }
        with torch.no_grad():
            images = chain.decode(trajectory.latents[0, :1], prompts[:1])
            picture = looking.decode(trajectory.latents[0, :1], prompts[:1])
    return Measurements(
        trajectory=trajectory_bytes(trajectory),
        embeddings=embeddings,
        encoding=encoding,
        sampling=sampling,
        step=step,
        decode=decode,
        images=images.numel() * 4,
        evaluation={} if evaluation_batch_size is None else {n: drawn[n] for n in (1, evaluation_batch_size)},
        verification=drawn[VERIFIED_IMAGES],
        picture=picture.numel() * 4,
    )


def blank_prompts(count: int, with_images: bool = False) -> list[Prompt]:
    """So many, with a grey picture each where samples are drawn from pictures."""
    image = None
    if with_images:
        Image.new("RGB", (1, 1), "grey").save(file := io.BytesIO(), "png")
        image = ConditionImage(data=file.getvalue())
    return [Prompt(f"prompt {i}", image=image) for i in range(count)]


def blank_trajectory(chain: DenoisingChain, prompts: list[Prompt]) -> Trajectory:
    """A micro-batch with the right shapes and no values, on the pipeline's device."""
    shape, steps = (len(prompts), *chain.latents_shape), chain.num_steps
    options: dict[str, Any] = {"device": chain.device, "dtype": chain.latents_dtype}
    return Trajectory(
        prompts=prompts,
        latents=torch.zeros(steps + 1, *shape, **options),
        noises=torch.zeros(steps + 1, *shape, **options),
        stds=tuple(chain.std(t) for t in range(1, steps + 1)),
        pred_original_samples=torch.zeros(steps, *shape, **options),
    )


def differentiated_step(chain: DenoisingChain, trajectory: Trajectory) -> Differentiated:
    """One step of the adjoint: replayed with a tape, and pulled back into the adapter and the latents."""
    memory = LiveMemory()
    with memory:
        with counted_tape() as tape:
            step = ReplayedStep(chain, trajectory, chain.num_steps)
            saved = tape.live
        _pull_back(step.output, [*chain.parameters, step.latents])
    return Differentiated(saved, memory.peak)


def _sampling(chain: DenoisingChain, trajectory: Trajectory) -> int:
    with LiveMemory() as memory:
        chain.denoise(trajectory, chain.num_steps, trajectory.latents[chain.num_steps], chain.num_steps - 1)
    return memory.peak


def _drawing(chain: DenoisingChain, prompts: list[Prompt]) -> tuple[int, int]:
    """Peaks of a denoiser step and of the decode without a tape; what is kept of the samples counts in both."""
    chain.encode(prompts)
    trajectory = blank_trajectory(chain, prompts)
    kept = trajectory_bytes(trajectory)
    sampling = _sampling(chain, trajectory)
    with LiveMemory() as memory, torch.no_grad():
        chain.decode(trajectory.latents[0], prompts).float()
    return sampling + kept, memory.peak + kept


def _decode(chain: DenoisingChain, trajectory: Trajectory, count: int, with_gradient: bool) -> Differentiated:
    latents = trajectory.latents[0, :count].detach().requires_grad_(with_gradient)
    memory = LiveMemory()
    with memory:
        with counted_tape() as tape, torch.set_grad_enabled(with_gradient):
            images = chain.decode(latents, trajectory.prompts[:count])
            saved = tape.live
        if with_gradient:
            _pull_back(images, [latents])
    return Differentiated(saved, memory.peak)


def _pull_back(output: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.autograd.grad(output, inputs, torch.zeros_like(output), allow_unused=True)


def _variants(models: list[Any]) -> Iterator[bool]:
    """Without gradient checkpointing, then with it where all models can."""
    for model in models:
        if getattr(model, "_supports_gradient_checkpointing", False):
            model.disable_gradient_checkpointing()
    yield False
    if all(getattr(model, "_supports_gradient_checkpointing", False) for model in models):
        with _checkpointing(models):
            yield True


@contextmanager
def _checkpointing(models: list[Any]) -> Iterator[None]:
    for model in models:
        model.enable_gradient_checkpointing()
    yield
    for model in models:
        model.disable_gradient_checkpointing()


def trajectory_bytes(trajectory: Trajectory) -> int:
    """Bytes of what a sampled micro-batch leaves behind."""
    kept = (trajectory.latents, trajectory.noises, trajectory.pred_original_samples)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


# bitsandbytes' block sizes: 4-bit weights, their scales when these are quantised again, and 8-bit Adam's states.
BLOCK_4BIT, BLOCK_OF_SCALES, BLOCK_8BIT_ADAM = 64, 256, 256
# Smaller tensors keep their Adam state in float32.
MIN_8BIT_SIZE = 4096


def weight_bytes(
    model: nn.Module, without: Iterable[nn.Parameter] = (), quantization: Mapping[str, Any] | None = None
) -> int:
    """Bytes of parameters and buffers, each once.

    Args:
        without: parameters that are counted elsewhere, the adapter's.
        quantization: arguments of BitsAndBytesConfig; its linear layers are then held in 4 or 8 bits.
    """
    excluded = {id(parameter) for parameter in without}
    quantized = _quantized_weights(model, quantization or {}, excluded)
    total = 0
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        if id(tensor) in quantized:
            total += round(quantized[id(tensor)])
        elif id(tensor) not in excluded:
            total += tensor.numel() * tensor.element_size()
    return total


def largest_quantized(model: nn.Module, quantization: Mapping[str, Any] | None, without: Iterable[nn.Parameter]) -> int:
    """Elements of the largest quantised matrix: it is held in full width while it multiplies."""
    quantized = _quantized_weights(model, quantization or {}, {id(parameter) for parameter in without})
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return max((sizes[key] for key in quantized), default=0)


# Float32 numbers that an optimiser keeps of every weight; Adafactor keeps those of rows and columns alone.
STATES = {"AdamW": 2, "Adafactor": 0, "Lion": 1, "Muon": 1, "Prodigy": 4}


def optimizer_bytes(parameters: Iterable[nn.Parameter], optimizer: str, use_8bit_adam: bool) -> int:
    """Bytes of an optimiser's state in float32, or of AdamW's in 8 bits with a scale for each block."""
    total = 0.0
    for parameter in parameters:
        size = parameter.numel()
        if optimizer == "AdamW" and use_8bit_adam and size >= MIN_8BIT_SIZE:
            total += 2 * size * (1 + 4 / BLOCK_8BIT_ADAM)
        elif optimizer == "Adafactor" and parameter.ndim > 1:
            total += 4 * (size // parameter.shape[-1] + size // parameter.shape[-2])
        else:
            total += 4 * size * max(STATES[optimizer], 1)
    return round(total)


def _quantized_weights(model: nn.Module, quantization: Mapping[str, Any], excluded: set[int]) -> dict[int, float]:
    """Bytes of every quantised matrix by its id."""
    if not quantization:
        return {}
    skipped = list(quantization.get("llm_int8_skip_modules") or [])
    found = {}
    for name, module in model.named_modules():
        is_skipped = any(skip in name.split(".") or name.startswith(f"{skip}.") or name == skip for skip in skipped)
        if isinstance(module, nn.Linear) and id(module.weight) not in excluded and not is_skipped:
            found[id(module.weight)] = _bytes_of_matrix(module.weight, quantization)
    return found


def _bytes_of_matrix(weight: torch.Tensor, quantization: Mapping[str, Any]) -> float:
    size, rows = weight.numel(), weight.shape[0]
    if quantization.get("load_in_8bit"):
        return size + 4 * rows  # one float32 scale for each row
    scales = size / BLOCK_4BIT
    if quantization.get("bnb_4bit_use_double_quant"):
        return size / 2 + scales + 4 * scales / BLOCK_OF_SCALES
    return size / 2 + 4 * scales
