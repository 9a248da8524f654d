"""Latents stay in single precision around half-precision modules: their inputs are cast on entry."""

from typing import Any

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)


class _InputCast:
    """Casts what enters a half-precision module; a forward pre-hook.

    Vectors (timesteps, guidance scales) keep the precision that the pipeline gave them.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype = _dtype_of(module)  # asked anew: pipelines upcast their VAE for a while
        if dtype not in HALF:
            return None
        return tuple(_cast(value, dtype) for value in args), {
            name: value if name == "timestep" else _cast(value, dtype) for name, value in kwargs.items()
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


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if torch.is_tensor(value):
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    if isinstance(value, dict):
        return {name: _cast(entry, dtype) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(entry, dtype) for entry in value)
    return value
