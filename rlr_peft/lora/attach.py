"""Puts trainable LoRA weights on a frozen denoiser, finds them again, and switches them off for the reference model."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from rlr_peft.chain.families import models_of

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADAPTER = "default"
"""What peft calls the adapter that is trained; it is not written to the file."""


def adapted_denoisers(pipeline: Any) -> list[str]:
    """The attributes of the pipeline whose module holds the trained adapter, in the pipeline's order."""
    return [name for name, part in models_of(pipeline).items() if ADAPTER in getattr(part, "peft_config", {})]


def attach_lora(
    denoiser: nn.Module,
    *,
    target_modules: Sequence[str],
    rank: int = 4,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
    init_lora_weights: str = "gaussian",
    seed: int = 0,
) -> list[nn.Parameter]:
    """Adds a trainable LoRA to the denoiser, in float32 whatever the base's dtype, and freezes everything else.

    Args:
        denoiser: UNet or transformer, changed in place; its output stays the same until the first update.
        target_modules: names, or ends of names after a dot, of the linear and convolution layers to adapt.
        rank: of each pair of matrices; at least 1, and even for `orthogonal`.
        lora_alpha: the product is scaled by `lora_alpha / rank` (by `lora_alpha / sqrt(rank)` with `use_rslora`);
            None means `rank`.
        lora_dropout: probability in [0, 1) of dropping an input of the LoRA in train mode.
        use_dora: also train the norm of each output's weights (DoRA).
        use_rslora: scale by the square root of the rank (rank-stabilised LoRA).
        init_lora_weights: `gaussian` (std 1 / rank), `kaiming` (uniform) or `orthogonal`.
        seed: the same seed gives the same weights whatever was drawn before; the global random state is left as it was.

    Returns:
        The trainable parameters, in the order of `lora_parameters`.

    Raises:
        ValueError: a target that matches no adaptable layer, or an odd rank for `orthogonal`.
    """
    if init_lora_weights == "orthogonal" and rank % 2:
        raise ValueError(f"rank must be even for orthogonal initialisation; got {rank}.")
    _check_targets(denoiser, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=list(target_modules),
        use_dora=use_dora,
        use_rslora=use_rslora,
        init_lora_weights="gaussian" if init_lora_weights == "gaussian" else True,
    )
    denoiser.requires_grad_(False)
    # peft draws on the default device and then moves the weights: on the CPU the numbers are the same on every machine
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(config, ADAPTER)  # type: ignore[operator]
        else:  # UNet3DConditionModel and PixArt have none
            inject_adapter_in_model(config, denoiser, ADAPTER)
        parameters = lora_parameters(denoiser)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if init_lora_weights == "orthogonal":
            _initialise_orthogonally(denoiser)
    return list(parameters.values())


def lora_size(denoiser: nn.Module, target_modules: Sequence[str], rank: int) -> int:
    """Number of weights that `attach_lora` would add for these targets (DoRA's norms, which are few, left out)."""
    size = 0
    for name, module in denoiser.named_modules():
        if isinstance(module, ADAPTABLE) and any(f".{name}".endswith(f".{target}") for target in target_modules):
            # A linear layer says its sizes itself: in 4 bits its weight is one packed column.
            shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else module.weight.shape
            size += rank * (math.prod(shape[1:]) + shape[0])
    return size


def lora_parameters(denoiser: nn.Module, adapter_name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the denoiser, in the denoiser's order: the same in every process."""
    of_adapter = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
    return {name: parameter for name, parameter in denoiser.named_parameters() if of_adapter.search(name)}


@contextmanager
def adapter_disabled(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the denoiser computes what its base model computes: the reference model, without a second copy of it."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, LoraLayer) and not layer.disable_adapters]
    requires_grad = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}

    def enable(enabled: bool) -> None:
        for layer in layers:
            layer.enable_adapters(enabled)
        # peft switches requires_grad along with the adapter, and a tape loses, silently, the gradients of parameters
        # that are switched off while it runs backward
        for parameter, value in requires_grad.items():
            parameter.requires_grad_(value)

    enable(False)
    try:
        yield
    finally:
        enable(True)


def _check_targets(denoiser: nn.Module, target_modules: Sequence[str]) -> None:
    adaptable = [
        name.removesuffix(".base_layer")  # a layer that already has another adapter can take a second one
        for name, module in denoiser.named_modules()
        if isinstance(module, ADAPTABLE) and ".lora_" not in name
    ]
    unmatched = [
        target for target in target_modules if not any(f".{name}".endswith(f".{target}") for name in adaptable)
    ]
    if target_modules and not unmatched:
        return
    endings = set()
    for name in adaptable:
        parts = name.split(".")
        endings.add(".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]))  # `to_out.0`: `0` alone says nothing
    wrong = f"no layer for {', '.join(map(repr, unmatched))}" if unmatched else "no targets at all"
    raise ValueError(
        f"LoRA targets: got {wrong}; expected names, or ends of names, of linear or convolution layers of "
        f"{type(denoiser).__name__}. Choose from: {', '.join(sorted(endings))}."
    )


def _initialise_orthogonally(denoiser: nn.Module) -> None:
    """A non-zero start whose product is zero: A and B use complementary halves of an orthonormal basis of R^rank.

    Drawn here because peft rounds its own to the base's dtype (in bf16 the product is then far from zero) and has none
    for convolutions.
    """
    for layer in denoiser.modules():
        if not isinstance(layer, LoraLayer):
            continue
        lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        rank = lora_a.shape[0]
        basis = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q
        down = basis[:, : rank // 2] @ torch.randn(rank // 2, lora_a[0].numel(), dtype=torch.float64) / 10
        up = torch.randn(lora_b.shape[0], rank // 2, dtype=torch.float64) @ basis[:, rank // 2 :].T / 10
        lora_a.data.copy_(down.reshape(lora_a.shape))
        lora_b.data.copy_(up.reshape(lora_b.shape))
