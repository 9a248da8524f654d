"""What keeps a pipeline small while it is driven: models that wait in host memory, casts, remembered embeddings.

The pipelines' own model offload moves everything off at the end of every call, while a tape still needs the weights.
Here a model leaves only when another one starts: a decode's tape is gone before a denoiser runs, and a denoiser step's
before the next decode. Text encoders are needed once for every prompt, and are often larger than the denoiser.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from torch import nn


class ModelOffload(ModelHook):
    """Accelerate's hook for one model; those of one pipeline know each other.

    Frozen weights do not change, so that their copies in host memory are kept and nothing is ever copied back. Weights
    that are trained stay on the device, beside their gradients and the optimiser's state.

    Args:
        device: where the model works.
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
    """Leaves every model of the pipeline in host memory until it is called; returns the hooks.

    Args:
        pipeline: loaded, in host memory; trained weights are added to it afterwards.
        device: where its models work.
    """
    peers: list[ModelOffload] = []
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            hook = ModelOffload(device, peers, movable=not getattr(part, "is_quantized", False))
            add_hook_to_module(part, hook)
    return peers


def working_device(model: nn.Module) -> torch.device:
    """Where a model works, whether or not its weights are there now."""
    hook = getattr(model, "_hf_hook", None)
    return hook.execution_device if isinstance(hook, ModelOffload) else next(model.parameters()).device


class OffloadedTextEncoders:
    """A pipeline's text encoders, on the CPU but while they encode.

    Args:
        pipeline: its text encoders are moved to the CPU at once.
        device: where they encode.
    """

    def __init__(self, pipeline: DiffusionPipeline, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._encoders = {
            name: part
            for name, part in pipeline.components.items()
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }
        self._move(torch.device("cpu"))

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, the pipeline has no text encoders: it takes its device from the models that it sees."""
        self._show(False)
        try:
            yield
        finally:
            self._show(True)

    def encoding(self, encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
        """The pipeline's bound ``encode_prompt``, for the inside of ``hidden``."""

        @functools.wraps(encode_prompt)
        def encode(*args: Any, **kwargs: Any) -> Any:
            self._show(True)
            self._move(self._device)
            try:
                return encode_prompt(*args, **kwargs)
            finally:
                self._move(torch.device("cpu"))
                self._show(False)

        return encode

    def _show(self, shown: bool) -> None:
        for name, encoder in self._encoders.items():
            # past the pipeline's __setattr__, which would drop the class from its config
            self._pipeline.__dict__[name] = encoder if shown else None

    def _move(self, device: torch.device) -> None:
        for encoder in self._encoders.values():
            encoder.to(device)


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


Embedding = torch.Tensor | list[torch.Tensor] | None
Embeddings = tuple[Embedding, ...]
Key = tuple[tuple[str, str], ...]

# A pipeline with two guidance branches encodes prompts and negative prompts in two calls.
JOINED_BATCHES = 4


class PromptMemory:
    """Replaces a pipeline's ``encode_prompt``; least recently used prompts are forgotten first.

    Single prompts wait in host memory (hundreds of T5's take a gigabyte); only the latest batches are on the device.

    Args:
        encode_prompt: the pipeline's bound method; its result is a tuple of (B, ...) tensors, lists of B tensors,
            tensors that all prompts share, or None.
        max_prompts: how many prompts are remembered.
        dtype: floating-point embeddings are handed out in this; None leaves them. Pipelines cast their latents to it.
    """

    def __init__(
        self, encode_prompt: Callable[..., Embeddings], max_prompts: int = 256, dtype: torch.dtype | None = None
    ) -> None:
        self._encode_prompt = encode_prompt
        self._signature = inspect.signature(encode_prompt)
        self._max_prompts = max_prompts
        self._dtype = dtype
        self._remembered: OrderedDict[Key, Embeddings] = OrderedDict()
        self._joined: OrderedDict[Key, Embeddings] = OrderedDict()
        self._device: torch.device | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Embeddings:
        """Embeddings of a list of prompts, joined from what is remembered of every prompt."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        key = _key(arguments)
        if key not in self._joined:  # the replays of a trajectory ask for the same batch again and again
            prompts = arguments["prompt"]
            count = 1 if isinstance(prompts, str) else len(prompts)
            rows = [self._encode_one(i, count, dict(arguments)) for i in range(count)]
            self._joined[key] = tuple(_cast(_moved(embedding, self._device), self._dtype) for embedding in _join(rows))
            if len(self._joined) > JOINED_BATCHES:
                self._joined.popitem(last=False)
        self._joined.move_to_end(key)
        # fresh lists: pipelines put theirs together with `+`
        return tuple(list(entry) if isinstance(entry, list) else entry for entry in self._joined[key])

    @torch.no_grad()
    def _encode_one(self, index: int, batch_size: int, arguments: dict[str, Any]) -> Embeddings:
        for name, value in arguments.items():
            if "prompt" in name and isinstance(value, list) and len(value) == batch_size:
                arguments[name] = [value[index]]
        key = _key(arguments)
        if key not in self._remembered:
            row = self._encode_prompt(**arguments)
            self._device = next((entry.device for entry in _tensors(row)), None)
            host = torch.device("cpu") if self._device is not None and self._device.type == "cuda" else None
            self._remembered[key] = tuple(_moved(embedding, host) for embedding in row)
            if len(self._remembered) > self._max_prompts:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]


def _join(rows: list[Embeddings]) -> Embeddings:
    """One batch of the embeddings of single prompts; shorter ones are padded with zeros, and a mask says so."""
    lengths = [_length(row[0]) for row in rows]
    uneven = len(set(lengths)) > 1
    joined: list[Embedding] = []
    for place, parts in enumerate(zip(*rows, strict=True)):
        if place == 1 and uneven and any(part is None for part in parts):  # no mask where nothing was padded
            parts = tuple(
                torch.ones(1, length, dtype=torch.long, device=_device(rows[0])) if part is None else part
                for part, length in zip(parts, lengths, strict=True)
            )
        joined.append(_join_parts(parts))
    return tuple(joined)


def _join_parts(parts: tuple[Embedding, ...]) -> Embedding:
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, list):
        return [entry for part in parts for entry in part]  # type: ignore[union-attr]
    tensors = [part for part in parts if torch.is_tensor(part)]
    longest = max(_length(tensor) for tensor in tensors)
    if first.shape[0] != 1:  # positions, such as FLUX's, are the same for every prompt
        return max(tensors, key=len)
    return torch.cat([_padded(tensor, longest) for tensor in tensors])


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    if tensor.ndim < 2 or tensor.shape[1] == length:
        return tensor
    padding = tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, padding], dim=1)


def _length(embedding: Embedding) -> int:
    return embedding.shape[1] if torch.is_tensor(embedding) and embedding.ndim > 1 else 0


def _device(row: Embeddings) -> torch.device:
    return next(entry.device for entry in row if torch.is_tensor(entry))


def _tensors(row: Embeddings) -> Iterator[torch.Tensor]:
    for entry in row:
        yield from [entry] if torch.is_tensor(entry) else entry or ()


def _moved(embedding: Embedding, device: torch.device | None) -> Embedding:
    if device is None or embedding is None:
        return embedding
    if isinstance(embedding, list):
        return [entry.to(device) for entry in embedding]
    return embedding.to(device)


def _cast(embedding: Embedding, dtype: torch.dtype | None) -> Embedding:
    if dtype is None or embedding is None:
        return embedding
    if isinstance(embedding, list):
        return [entry.to(dtype) for entry in embedding]
    return embedding.to(dtype) if embedding.is_floating_point() else embedding


def _key(arguments: dict[str, Any]) -> Key:
    for name, value in arguments.items():
        if torch.is_tensor(value):
            raise ValueError(f"Expected prompts as text, got a tensor for {name}.")
    return tuple((name, str(value)) for name, value in sorted(arguments.items()))
