"""Bytes of weights, of the adapter's optimiser, and of what quantisation leaves of a base."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

# bitsandbytes' block sizes: 4-bit weights, their scales when these are quantised again, and 8-bit Adam's states.
BLOCK_4BIT, BLOCK_OF_SCALES, BLOCK_8BIT_ADAM = 64, 256, 256
# Smaller tensors keep their Adam state in float32.
MIN_8BIT_SIZE = 4096


def weight_bytes(
    model: nn.Module, without: Iterable[nn.Parameter] = (), quantization: Mapping[str, Any] | None = None
) -> int:
    """Bytes of parameters and buffers, each once.

    Args:
        model: on any device.
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


def optimizer_bytes(parameters: Iterable[nn.Parameter], use_8bit_adam: bool) -> int:
    """Bytes of Adam's two moments, in float32 or in 8 bits with a scale for each block."""
    total = 0.0
    for parameter in parameters:
        size = parameter.numel()
        is_8bit = use_8bit_adam and size >= MIN_8BIT_SIZE
        total += 2 * size * (1 + 4 / BLOCK_8BIT_ADAM) if is_8bit else 8 * size
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
