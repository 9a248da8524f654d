"""The reward, the training loop and what a run leaves: knobs."""

from dataclasses import MISSING, dataclass
from typing import Literal

from rlr_peft.config.knob import knob


@dataclass(frozen=True)
class RewardArguments:
    """Reward: what the adapter is trained to raise"""

    reward_fn: dict[str, float] | str = knob(
        MISSING,
        "Reward: a registered name, `package.module:callable`, `file.py:callable` or http(s) URL; or several and their "
        "weights, `{NAME: WEIGHT, ...}`.",
        found="reward",
    )
    heldout_reward_fn: tuple[str, ...] | None = knob(
        None,
        "One or more rewards that are only ever measured, never trained on: they expose reward hacking. Early stopping "
        "watches the first.",
        found="reward",
    )
    reward_scaling: Literal["running", "first", "none"] = knob(
        "running",
        "What each of several rewards is divided by: its standard deviation over past updates, that of images of the "
        "base, or nothing.",
    )
    reward_minimum: dict[str, float] | None = knob(
        None,
        "Hard minimums of rewards of reward_fn, `{NAME: MINIMUM, ...}`, in the rewards' own units.",
        found="reward",
    )
    reward_minimum_penalty: float = knob(
        10.0,
        "What a reward below its minimum costs for every standard deviation that it lacks.",
        unit="standard deviations of reward",
        above=0,
        at_most=1e6,
    )
    reward_dtype: Literal["fp32", "fp16", "bf16"] = knob(
        "fp32", "Number format of the weights of built-in reward models."
    )
    offload_rewards: bool = knob(
        False, "Keep built-in reward models in CPU memory between uses: less GPU memory, more time."
    )
    reward_model_path: dict[str, str] | None = knob(
        None,
        "Local copies of reward models, `{REPOSITORY: PATH, ...}`: a folder or file that stands for a Hub repository.",
    )
    reward_server_timeout: float = knob(
        120.0,
        "How long one try with a reward server may take, up to its answer's last byte, before it is asked again.",
        unit="seconds",
        above=0,
        at_most=86400,
    )
    reward_server_retries: int = knob(
        5,
        "Further tries when a reward server does not answer, or answers 429 or 5xx.",
        unit="tries",
        at_least=0,
        at_most=1000,
    )
    reward_server_batch_size: int = knob(
        16, "Images sent to a reward server at once.", unit="images", at_least=1, at_most=4096
    )
    decode_batch_size: int | None = knob(
        None,
        "Images decoded and scored on the tape at once; null means train_batch_size.",
        unit="images",
        at_least=1,
        at_most=4096,
    )
    decoded_frames: int | None = knob(
        None,
        "Train on the first so many frames of a video alone, for the decoder's memory; null decodes all.",
        unit="frames",
        at_least=1,
        at_most=10_000,
    )


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


@dataclass(frozen=True)
class ValidationArguments:
    """Validation: images while training, and the comparison of base and adapter"""

    validation_prompt: tuple[str, ...] | None = knob(
        None, "One or more prompts drawn at fixed seeds while training; null means none.", found="words"
    )
    num_validation_images: int = knob(
        4, "Images for each validation prompt.", unit="images", at_least=1, at_most=10_000
    )
    validation_steps: int | None = knob(
        None,
        "How often validation images are drawn; null means only at the end.",
        unit="optimiser steps",
        at_least=1,
        at_most=10**9,
    )
    evaluation_prompt_path: str | None = knob(
        None, "Unseen prompts on which base and adapter are compared; null means no comparison.", found="prompts"
    )
    num_evaluation_images: int = knob(
        256,
        "Images drawn from the base and from the adapter for the comparison.",
        unit="images",
        at_least=2,
        at_most=10**6,
    )
    evaluation_batch_size: int = knob(
        16, "Images drawn at once in the comparison.", unit="images", at_least=1, at_most=4096
    )
    evaluation_eta: float = knob(
        0.0,
        "The chain's eta while evaluating; 0 is what a deterministic sampler draws.",
        unit="factor",
        at_least=0,
        at_most=10,
    )
    skip_final_inference: bool = knob(False, "Draw no validation images after training.")


@dataclass(frozen=True)
class CheckpointingArguments:
    """Checkpointing: saving the state and resuming from it"""

    checkpointing_steps: int = knob(
        500, "How often a checkpoint is saved.", unit="optimiser steps", at_least=1, at_most=10**9
    )
    checkpoints_total_limit: int | None = knob(
        None, "Checkpoints kept, the oldest go first; null means all.", unit="checkpoints", at_least=1, at_most=10**6
    )
    resume_from_checkpoint: str | None = knob(
        None, "Checkpoint to go on from: `latest`, a name such as `checkpoint-500`, or a path."
    )


@dataclass(frozen=True)
class HubArguments:
    """Hub: publishing the adapter"""

    push_to_hub: bool = knob(
        False, "Publish the adapter, its card and figures on the Hub at the end; access is checked before training."
    )
    hub_model_id: str | None = knob(
        None,
        "Repository, `owner/name` or `name`; null means the name of output_dir, of the token's user.",
        found="words",
    )
    hub_token: str | None = knob(
        None,
        "Access token with the right to write, never shown or saved; null takes that of HF_TOKEN or `hf auth login`.",
        secret=True,
    )
    hub_private_repo: bool = knob(False, "Make the repository a private one; one that exists must be private.")
    hub_revision: str | None = knob(None, "Branch to publish on, made when missing; null means main.", found="words")
    push_every: int | None = knob(
        None,
        "How often the adapter of a checkpoint is published while training, on a branch `checkpoint-STEP`; null means "
        "never.",
        unit="optimiser steps",
        at_least=1,
        at_most=10**9,
    )


@dataclass(frozen=True)
class LoggingArguments:
    """Logging: where the curves go"""

    logging_dir: str = knob("logs", "Folder of the tracker's files, inside output_dir.")
    report_to: Literal["tensorboard", "none"] = knob("tensorboard", "Tracker that receives the curves and images.")
    tracker_name: str = knob("rlr-lora", "Name of the run in the tracker.")
