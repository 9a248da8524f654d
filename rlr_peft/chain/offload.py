"""Keeps a pipeline's models in host memory, and on the device only the one that is at work.

The pipelines' own model offload moves everything off at the end of every call, under the feet of a tape that still
needs the weights. Here a model leaves only when another one starts: a decode's tape is gone before a denoiser runs, and
a denoiser step's before the next decode.
"""

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
