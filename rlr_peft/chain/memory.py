"""What keeps a pipeline small while it is driven: models that wait in host memory, and casts.

The pipelines' own model offload moves everything off at the end of every call, while a tape still needs the weights.
Here a model leaves only when another one starts: a decode's tape is gone before a denoiser runs, and a denoiser step's
before the next decode. Text encoders are needed once for every prompt, without a tape, and are often larger than the
denoiser: of them one block at a time is there. A VAE may decode in tiles, which the backward pass recomputes one at a
time: its tape is that of a single tile.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlr_peft.chain.families import models_of


class ModelOffload(ModelHook):
    """Accelerate's hook for one model; those of one pipeline know each other.

    Frozen weights do not change, so that their copies in host memory are kept and nothing is ever copied back. Weights
    that are trained stay on the device, beside their gradients and the optimiser's state.

    Args:
        peers: the hooks of all models of the pipeline; this one adds itself.
        movable: False for weights that must stay, such as bitsandbytes'.

    Attributes:
        execution_device: where the model works, by the name that diffusers asks for.
    """

    def __init__(self, device: torch.device, peers: list["ModelOffload"], movable: bool = True) -> None:
        self.execution_device = device
        self._peers = peers
        self._movable = movable
        self._module: nn.Module | None = None
        self._host: dict[torch.Tensor, torch.Tensor] = {}
        self._staying: set[torch.Tensor] = set()
        peers.append(self)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called by accelerate."""
        self._module = module
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Called by accelerate before the model runs: the others leave, this one comes."""
        for peer in self._peers:
            if peer is not self:
                peer.leave()
        self._come()
        return args, kwargs

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are on the device only because the model is at work."""
        return sum(tensor.nbytes for tensor in self._host)

    def leave(self) -> None:
        """Drops the weights from the device."""
        for tensor, host in self._host.items():
            tensor.data = host
        self._host.clear()

    def _come(self) -> None:
        if self._module is None or not self._movable:
            return
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            if tensor in self._host or tensor in self._staying:
                continue
            if tensor.requires_grad:
                self._staying.add(tensor)
                tensor.data = tensor.data.to(self.execution_device)
            else:
                self._host[tensor] = tensor.data
                tensor.data = tensor.data.to(self.execution_device, copy=True)


def offload_models(pipeline: DiffusionPipeline, device: torch.device) -> list[ModelOffload]:
    """Leaves every model of the pipeline in host memory until it is called, text encoders block by block.

    Args:
        pipeline: loaded, in host memory; trained weights are added to it afterwards.

    Returns:
        The hooks of whole models: of all but the text encoders.
    """
    peers: list[ModelOffload] = []
    encoders = text_encoders(pipeline)
    for name, part in models_of(pipeline).items():
        if name not in encoders:
            hook = ModelOffload(device, peers, movable=not getattr(part, "is_quantized", False))
            add_hook_to_module(part, hook)
    offload_text_encoders(pipeline, device, peers)
    return peers


def working_device(model: nn.Module) -> torch.device:
    """Where a model works, whether or not its weights are there now."""
    hook = getattr(model, "_hf_hook", None)
    return hook.execution_device if isinstance(hook, ModelOffload) else next(model.parameters()).device


class BlockOffload(ModelHook):
    """Accelerate's hook for one block of a text encoder, whose weights are on the device during its call alone.

    Args:
        tensors: its weights and buffers, in host memory.
        peers: hooks of whole models, which leave before it comes.

    Attributes:
        execution_device: where it works, by the name that diffusers asks for.
    """

    def __init__(self, device: torch.device, tensors: list[torch.Tensor], peers: Sequence[ModelOffload] = ()) -> None:
        self.execution_device = device
        self._tensors = tensors
        self._peers = peers
        self._host: list[torch.Tensor] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Called by accelerate before the block runs."""
        for peer in self._peers:
            peer.leave()
        self._host = [tensor.data for tensor in self._tensors]
        for tensor in self._tensors:
            tensor.data = tensor.data.to(self.execution_device, copy=True)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called by accelerate after the block ran: the copies in host memory have not changed."""
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host
        self._host = []
        return output


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's text encoders, by its names of them."""
    return {name: part for name, part in models_of(pipeline).items() if name.startswith("text_encoder")}


def blocks(model: nn.Module) -> list[tuple[nn.Module, list[torch.Tensor]]]:
    """The parts that come to the device one at a time, with their weights and buffers.

    They are the entries of the model's lists of layers, whole, and of all other modules what they hold themselves. The
    model itself is the first, whether or not it holds anything.
    """
    whole = {
        entry
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for entry in module
        if not isinstance(entry, nn.ModuleList)
    }
    inside = {below for entry in whole for below in entry.modules() if below is not entry}
    found = []
    for module in model.modules():
        recurse = module in whole
        tensors = [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]
        if module not in inside and (tensors or module is model):
            found.append((module, tensors))
    return found


def largest_block(pipeline: DiffusionPipeline) -> int:
    """Bytes of the largest block of the text encoders, the most that is on the device of offloaded ones."""
    sizes = (
        sum(tensor.nbytes for tensor in tensors)
        for encoder in text_encoders(pipeline).values()
        for _, tensors in blocks(encoder)
    )
    return max(sizes, default=0)


def offload_text_encoders(
    pipeline: DiffusionPipeline, device: torch.device, peers: Sequence[ModelOffload] = ()
) -> None:
    """Keeps the text encoders in host memory; each of their blocks is on the device while it encodes.

    The embeddings are those of encoders that are there as a whole: the same kernels see the same numbers.

    Args:
        peers: hooks of whole models, which leave before a block comes.
    """
    for encoder in text_encoders(pipeline).values():
        encoder.to("cpu")
        for module, tensors in blocks(encoder):
            add_hook_to_module(module, BlockOffload(device, tensors, peers))


@contextmanager
def hidden(pipeline: DiffusionPipeline, models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the pipeline has none of these models of its own, so that moving it leaves them where they are."""
    # past the pipeline's __setattr__, which would drop the class from its config
    pipeline.__dict__.update(dict.fromkeys(models))
    try:
        yield
    finally:
        pipeline.__dict__.update(models)


HALF = (torch.float16, torch.bfloat16)


class _InputCast:
    """Casts what enters a half-precision module; a forward pre-hook.

    Vectors (timesteps, guidance scales) keep the precision that the pipeline gave them.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype = _dtype_of(module)  # asked anew: pipelines upcast their VAE for a while
        if dtype not in HALF:
            return None
        return tuple(_cast_input(value, dtype) for value in args), {
            name: value if name == "timestep" else _cast_input(value, dtype) for name, value in kwargs.items()
        }


def cast_inputs_to_weights(module: nn.Module) -> None:
    """Adds the cast once, and only where weights are in half precision."""
    has_cast = any(isinstance(hook, _InputCast) for hook in module._forward_pre_hooks.values())
    if _dtype_of(module) in HALF and not has_cast:
        module.register_forward_pre_hook(_InputCast(), with_kwargs=True)


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """A diffusers model knows which of its weights are kept in float32 and do not count."""
    parameter = next(module.parameters(), None)
    return getattr(module, "dtype", None if parameter is None else parameter.dtype)


def _cast_input(value: Any, dtype: torch.dtype) -> Any:
    if torch.is_tensor(value):
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    if isinstance(value, dict):
        return {name: _cast_input(entry, dtype) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast_input(entry, dtype) for entry in value)
    return value


class _Recomputed(nn.Module):
    """A decoder that keeps nothing but its input for the backward pass."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of a tile."""
        decoded: torch.Tensor = checkpoint(self.decoder, latents, use_reentrant=False, preserve_rng_state=False)
        return decoded


def in_tiles(vae: Any, pixels: int) -> Any:
    """A decoder over the same weights, which decodes squares of so many pixels and blends them where they overlap.

    Normalisation and attention see a tile in place of the image, so that its images are not quite the VAE's.

    Args:
        vae: an AutoencoderKL; left as it is.

    Raises:
        ValueError: another class, or tiles smaller than four latents.
    """
    if type(vae).__name__ != "AutoencoderKL":
        raise ValueError(
            f"vae_tile_size: expected a pipeline with an AutoencoderKL, got {type(vae).__name__}; leave "
            "--vae_tile_size out."
        )
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    if pixels % (4 * scale):
        raise ValueError(
            f"vae_tile_size: expected a multiple of {4 * scale} pixels, of whose latents a quarter overlaps, got "
            f"{pixels}; round it."
        )
    tiled = copy.copy(vae)
    tiled.__dict__["_modules"] = {**vae._modules, "decoder": _Recomputed(vae.decoder)}
    tiled.enable_tiling()
    tiled.tile_sample_min_size, tiled.tile_latent_min_size = pixels, pixels // scale
    return tiled
