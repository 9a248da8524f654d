"""The optimiser of the LoRA weights and the course of its learning rate."""

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from rlr_peft.config import OptimizerArguments


def build_optimizer(
    parameters: Iterable[nn.Parameter], arguments: OptimizerArguments, *, samples_per_step: int = 1
) -> torch.optim.Optimizer:
    """AdamW, with its state in float32 or, with `use_8bit_adam`, in 8 bits (tensors of 4096 elements or more).

    Args:
        parameters: the trainable ones, in an order that is the same in every run: a resumed state is matched by it.
        arguments: the configuration's optimiser group.
        samples_per_step: batch size times accumulation steps times processes; multiplies the learning rate when
            `scale_lr` is set.

    Raises:
        ValueError: an unknown optimiser, or 8 bits without bitsandbytes.
    """
    if arguments.optimizer != "AdamW":
        raise ValueError(f"optimizer must be AdamW; got {arguments.optimizer!r}.")
    learning_rate = arguments.learning_rate * (samples_per_step if arguments.scale_lr else 1)
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    if not arguments.use_8bit_adam:
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=betas,
            eps=arguments.adam_epsilon,
            weight_decay=arguments.adam_weight_decay,
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "use_8bit_adam expects bitsandbytes, which cannot be imported here. Run `pip install bitsandbytes`, "
            "or train without --use_8bit_adam."
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=learning_rate, betas=betas, eps=arguments.adam_epsilon, weight_decay=arguments.adam_weight_decay
    )
    return optimizer


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, arguments: OptimizerArguments, num_training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of diffusers' name `lr_scheduler`, to be stepped once after every optimiser step.

    It counts optimiser steps of the whole run, so it must not go through `accelerator.prepare`, whose wrapper steps
    once for each process.
    """
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        arguments.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=arguments.lr_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=arguments.lr_num_cycles,
        power=arguments.lr_power,
    )
    return scheduler
