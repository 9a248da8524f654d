"""The optimiser of the LoRA weights, the course of its learning rate, and the average of the weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_wsd_schedule

from rlr_peft.config import OptimizerArguments
from rlr_peft.config.chain import AUTO
from rlr_peft.extras import extra

EXTRAS = {
    "AdamW8bit": ("bitsandbytes.optim", "quantization", "--use_8bit_adam"),
    "Lion": ("bitsandbytes.optim", "quantization", "--optimizer Lion"),
    "Prodigy": ("prodigyopt", "prodigy", "--optimizer Prodigy"),
}
"""Where optimisers are that are not torch's own: module, our extra that has it, and what asks for it."""
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")
"""What this run's config says of an optimiser's group; the rest, such as Prodigy's estimate, is its state."""


def build_optimizer(
    parameters: Iterable[nn.Parameter], arguments: OptimizerArguments, *, samples_per_step: int = 1
) -> torch.optim.Optimizer:
    """The optimiser of that name; AdamW with `use_8bit_adam` keeps its state in 8 bits (of 4096 elements or more).

    What has no knob is the class's own default, but Muon's steps are scaled to the size of AdamW's
    (https://arxiv.org/abs/2502.16982), so that learning rates of AdamW are of use.

    Args:
        parameters: the trainable ones, in an order that is the same in every run: a resumed state is matched by it.
        arguments: the configuration's optimiser group.
        samples_per_step: batch size times accumulation steps times processes; multiplies the learning rate when
            `scale_lr` is set.

    Raises:
        UserError: the optimiser's package is missing.
        ValueError: Muon beside weights of convolutions, which are no matrices, or with a torch that has none.
    """
    if arguments.learning_rate == AUTO:
        learning_rate = 0.0  # not known before the first update, see training/learning_rate.py
    else:
        learning_rate = float(arguments.learning_rate) * (samples_per_step if arguments.scale_lr else 1)
    name = arguments.optimizer + ("8bit" if arguments.use_8bit_adam else "")
    optimizer_class = _optimizer_class(name)
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": arguments.adam_weight_decay}
    if name in ("AdamW", "AdamW8bit", "Prodigy"):
        options |= {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}
    elif name == "Muon":
        options["adjust_lr_fn"] = "match_rms_adamw"
    with redirect_stdout(StringIO()):  # Prodigy prints that it decays weights
        optimizer: torch.optim.Optimizer = optimizer_class(parameters, **options)
    return optimizer


def _optimizer_class(name: str) -> Any:
    if name in EXTRAS:
        return getattr(extra(*EXTRAS[name]), name)
    if not hasattr(torch.optim, name):
        raise ValueError(f"optimizer: {name} expects torch 2.9 or newer, got {torch.__version__}; take another.")
    return getattr(torch.optim, name)


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, arguments: OptimizerArguments, num_training_steps: int
) -> LambdaLR:
    """The schedule of the name `lr_scheduler`, to be stepped once after every optimiser step.

    It counts optimiser steps of the whole run, so it must not go through `accelerator.prepare`, whose wrapper steps
    once for each process.
    """
    if arguments.schedule == "warmup_stable_decay":
        decay = num_training_steps - max(num_training_steps // 2, arguments.lr_warmup_steps)
        stable_decay: LambdaLR = get_wsd_schedule(
            optimizer, arguments.lr_warmup_steps, decay, num_training_steps, decay_type="linear"
        )
        return stable_decay
    scheduler: LambdaLR = get_scheduler(
        arguments.schedule,
        optimizer=optimizer,
        num_warmup_steps=arguments.lr_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=arguments.lr_num_cycles,
        power=arguments.lr_power,
    )
    return scheduler


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LambdaLR,
    optimizer_state: Mapping[str, Any],
    lr_scheduler_state: Mapping[str, Any],
) -> None:
    """Puts both where a checkpoint left them, but with the learning rate, betas and so on that this run asks for.

    Their own `load_state_dict` would bring back those of the checkpoint, whatever the config of the resumed run says.
    With `learning_rate: auto` the rate is the checkpoint's.
    """
    asked = [{name: group[name] for name in SETTINGS if name in group} for group in optimizer.param_groups]
    base_rates = [ours or theirs for ours, theirs in zip(lr_scheduler.base_lrs, lr_scheduler_state["base_lrs"])]
    optimizer.load_state_dict(dict(optimizer_state))
    lr_scheduler.load_state_dict(dict(lr_scheduler_state))
    lr_scheduler.base_lrs = base_rates
    rates = [rate * factor(lr_scheduler.last_epoch) for rate, factor in zip(base_rates, lr_scheduler.lr_lambdas)]
    for group, settings, rate in zip(optimizer.param_groups, asked, rates, strict=True):
        group.update(settings | {"lr": rate})
    lr_scheduler._last_lr = rates


def build_ema(parameters: Iterable[nn.Parameter], arguments: OptimizerArguments) -> EMAModel | None:
    """diffusers' moving average of the parameters, to be stepped after every optimiser step; None without `use_ema`."""
    return EMAModel(parameters, decay=arguments.ema_decay) if arguments.use_ema else None


def restore_ema(ema: EMAModel, state: Mapping[str, Any]) -> None:
    """Puts the average where a checkpoint left it, but with the decay that this run asks for."""
    device = ema.shadow_params[0].device
    ema.load_state_dict({**state, "decay": ema.decay})
    ema.to(device)


@contextmanager
def averaged(ema: EMAModel | None, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are their average; without one they stay as they are. Not to be nested."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
