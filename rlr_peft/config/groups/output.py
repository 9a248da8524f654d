"""Knobs of what a run leaves: images and comparisons, checkpoints, a repository, curves."""

from dataclasses import dataclass
from typing import Literal

from rlr_peft.config.knob import knob


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
