"""Knobs of the training loop and its optimiser."""

from dataclasses import dataclass
from typing import Literal

from rlr_peft.config.knob import knob

# `piecewise_constant` is left out: diffusers' get_scheduler wants a rule string for it, which has no flag here.
LrScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class TrainingArguments:
    """Training: batches, length and seed"""

    output_dir: str = knob("outputs/rlr-lora", "Folder that receives the adapter, checkpoints, logs and the card.")
    seed: int = knob(0, "Seed of every random number; the same seed gives the same run.", at_least=0, at_most=2**63 - 1)
    train_batch_size: int = knob(
        4, "Samples drawn and held on the tape at once on each process.", unit="samples", at_least=1, at_most=4096
    )
    gradient_accumulation_steps: int = knob(
        1,
        "Micro-batches whose gradients are summed into one update.",
        unit="micro-batches",
        at_least=1,
        at_most=100_000,
    )
    num_images_per_prompt: int = knob(
        4, "Size of a prompt's group, within which rewards are compared.", unit="images", at_least=1, at_most=100_000
    )
    num_train_epochs: int = knob(
        1, "Passes over the prompts; max_train_steps overrides it.", unit="epochs", at_least=1, at_most=10**9
    )
    max_train_steps: int | None = knob(
        None,
        "Number of updates; null means num_train_epochs decides.",
        unit="optimiser steps",
        at_least=1,
        at_most=10**9,
    )
    max_grad_norm: float = knob(
        1.0, "Gradients with a larger norm are scaled down to it.", unit="norm", above=0, at_most=1e9
    )


@dataclass(frozen=True)
class OptimizerArguments:
    """Optimiser: how gradients become updates"""

    optimizer: Literal["AdamW"] = knob("AdamW", "Optimiser of the LoRA weights.")
    learning_rate: float = knob(
        1e-4, "Peak learning rate of the optimiser.", unit="weight units per step", above=0, at_most=10
    )
    scale_lr: bool = knob(
        False, "Multiply the learning rate by the number of samples of an update (batch, accumulation, processes)."
    )
    lr_scheduler: LrScheduler = knob("constant", "Course of the learning rate, by diffusers' names.")
    lr_warmup_steps: int = knob(
        0, "Updates over which the learning rate rises from 0.", unit="optimiser steps", at_least=0, at_most=10**9
    )
    lr_num_cycles: int = knob(
        1, "Hard restarts of the cosine_with_restarts schedule.", unit="cycles", at_least=1, at_most=10**6
    )
    lr_power: float = knob(1.0, "Power of the polynomial schedule.", unit="exponent", above=0, at_most=100)
    use_8bit_adam: bool = knob(False, "Keep the optimiser's state in 8 bits (bitsandbytes): less memory.")
    adam_beta1: float = knob(0.9, "Decay of Adam's mean of gradients.", unit="fraction", at_least=0, below=1)
    adam_beta2: float = knob(0.999, "Decay of Adam's mean of squared gradients.", unit="fraction", at_least=0, below=1)
    adam_weight_decay: float = knob(
        1e-4,
        "Decoupled weight decay of the LoRA weights.",
        unit="fraction per unit of learning rate",
        at_least=0,
        at_most=1000,
    )
    adam_epsilon: float = knob(
        1e-8, "Term that keeps Adam's division finite.", unit="gradient units", above=0, at_most=1
    )
