"""What keeps a pipeline small while it is driven: models that wait in host memory, and casts.

The pipelines' own model offload moves everything off at the end of every call, while a tape still needs the weights.
Here a model leaves only when another one starts: a decode's tape is gone before a denoiser runs, and a denoiser step's
before the next decode. Text encoders are needed once for every prompt, and are often larger than the denoiser.
"""

import functools
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
