"""The training loop and what a run leaves: knobs, and what of them cannot be together."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, gcd
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

from rlr_peft.config.chain import AUTO
from rlr_peft.config.knob import Group, knob
from rlr_peft.config.model import check_revision
from rlr_peft.files import stays_inside, why_no_place

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config

# Images of the comparison where the run is long enough; their standard error is then 6 % of the scores' spread.
MOST_EVALUATION_IMAGES = 256
LONGEST_UNSAVED = 500  # optimiser steps
COMPARED_IMAGES = 4  # of a prompt, where rewards are compared within it
SHARE = 10  # of a run: the part that a crash may cost, and that evaluating the base may take


# `piecewise_constant` is left out: diffusers' get_scheduler wants a rule string for it, which has no flag here.
# `warmup_stable_decay` is transformers' name.
LrScheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class TrainingArguments(Group):
    """Training: batches, length and seed"""

    output_dir: str = knob("outputs/rlr-lora", "Folder that receives the adapter, checkpoints, logs and the card.")
    seed: int = knob(
        0, "Seed of every random number; the same seed gives the same run.", within="[0, 9223372036854775807]"
    )
    train_batch_size: int = knob(
        4, "Images that each process samples and differentiates at once.", unit="samples", within="[1, 4096]"
    )
    gradient_accumulation_steps: int | Literal["auto"] = knob(
        1,
        "Micro-batches whose gradients are summed into one update; `auto`, for `--estimator auto`, measures how many "
        "are worth their cost.",
        unit="micro-batches",
        within="[1, 100000]",
    )
    num_images_per_prompt: int | Literal["auto"] = knob(
        AUTO,
        "Images of each prompt in an update: its group. `auto` is 4, or as many as divide the update, for methods that "
        "compare the rewards of a group, and 1 for others: the images of a prompt have nearly the same gradient.",
        unit="images",
        within="[1, 100000]",
    )
    num_train_epochs: int = knob(
        1, "Passes over the prompts; max_train_steps overrides it.", unit="epochs", within="[1, 1e9]"
    )
    max_train_steps: int | None = knob(
        None, "Number of updates; null means num_train_epochs decides.", unit="optimiser steps", within="[1, 1e9]"
    )
    max_grad_norm: float = knob(
        1.0, "Gradients with a larger norm are scaled down to it.", unit="norm", within="(0, 1e9]"
    )

    detach_negative: bool = knob(
        False,
        "Take no gradient through the negative branch of guidance: half of a step's memory and backward pass, but a "
        "biased gradient.",
    )
    shard_denoiser: bool = knob(
        False,
        "Share the frozen denoiser out over all processes, each of which otherwise holds the whole: less memory, time "
        "for gathering its blocks.",
    )

    @property
    def fixed_samples(self) -> int:
        """Samples of one process in one update; of one micro-batch where the number of those is measured."""
        steps = self.gradient_accumulation_steps
        return self.train_batch_size * (steps if isinstance(steps, int) else 1)

    @property
    def compared_images(self) -> int:
        """Images of a prompt where rewards are compared within it."""
        if isinstance(self.num_images_per_prompt, int):
            return self.num_images_per_prompt
        return next(size for size in range(COMPARED_IMAGES, 0, -1) if self.fixed_samples % size == 0)

    def check_compared(self, method: str, instead: str = "") -> Iterator[str]:
        """Yields what to change where `method` has no two images of a prompt to compare."""
        if self.compared_images > 1:
            return
        why = f"with {method}, which compares the images of a prompt with each other"
        if self.num_images_per_prompt != AUTO:
            yield f"num_images_per_prompt: expected 2 or more {why}, got 1; leave it out, or give 4.{instead}"
            return
        yield (
            f"train_batch_size: expected a number of images in an update that 2, 3 or 4 divides {why}, got "
            f"{self._samples_in_words}; give {self._more_samples(COMPARED_IMAGES)}.{instead}"
        )

    @property
    def _samples_in_words(self) -> str:
        return (
            f"{self.fixed_samples} (train_batch_size {self.train_batch_size} x gradient_accumulation_steps "
            f"{self.gradient_accumulation_steps})"
        )

    def _more_samples(self, multiple_of: int) -> str:
        """The flag that gives an update the next larger number of images that this one divides."""
        steps, batch = self.gradient_accumulation_steps, self.train_batch_size
        if not isinstance(steps, int):
            return f"--train_batch_size {ceil(batch / multiple_of) * multiple_of}"
        unit = multiple_of // gcd(multiple_of, batch)
        return f"--gradient_accumulation_steps {ceil(steps / unit) * unit}"

    def check(self, config: "Config") -> Iterator[str]:
        yield from self._check_measured_batch(config) if self.gradient_accumulation_steps == AUTO else ()
        if self.fixed_samples % self.compared_images:
            yield (
                "num_images_per_prompt: expected a number that divides the images of an update, "
                f"{self._samples_in_words}, got {self.num_images_per_prompt}; leave it out, or give "
                f"{self._more_samples(self.compared_images)}."
            )
        if reason := why_no_place(Path(self.output_dir)):
            yield (
                f"output_dir: expected a folder or a place for one, got {self.output_dir}, where {reason}; choose "
                "another."
            )
        model, lora = config.model, config.lora
        for name, wanted in (
            ("offload", model.offload),
            ("bnb_quantization_config_path", model.bnb_quantization_config_path is not None),
            ("torch_compile", model.torch_compile),
            ("use_dora", lora.use_dora),
        ):
            if self.shard_denoiser and wanted:
                yield (
                    f"shard_denoiser: expected none with {name}, got both; drop one of the two (--{name} null, if a "
                    "config has it)."
                )

    def _check_measured_batch(self, config: "Config") -> Iterator[str]:
        start = "gradient_accumulation_steps: expected a number"
        if config.estimator.estimator != "auto":
            yield (
                f"{start} with {config.estimator.estimator}, got auto, which needs a method that measures the noise of "
                "all others; use --estimator auto, or look at the noise scales of `rlr-peft diagnose`."
            )
        if config.optimizer.scale_lr:
            yield f"{start} with scale_lr, got auto; drop --scale_lr, and use --learning_rate auto."
        if self.max_train_steps is None:
            yield f"{start} or a length in updates, got auto; give --max_train_steps."


ADAM_KNOBS = ("adam_beta1", "adam_beta2", "adam_epsilon")
LEAST_PRODIGY_RATE = 0.1


@dataclass(frozen=True)
class OptimizerArguments(Group):
    """Optimiser: how gradients become updates"""

    optimizer: Literal["AdamW", "Adafactor", "Lion", "Muon", "Prodigy"] = knob(
        "AdamW",
        "Optimiser. Learning rates differ: Muon's and Adafactor's are those of AdamW, Lion's are 3 to 10 times "
        "lower, and Prodigy's is 1.",
    )
    learning_rate: float | Literal["auto"] = knob(
        "auto",
        "Peak learning rate of the optimiser; `auto` finds it by how far the first update changes the images, and "
        "halves it where the reward falls.",
        unit="weight units per step",
        within="(0, 10]",
    )
    scale_lr: bool = knob(
        False, "Multiply the learning rate by the number of samples of an update (batch, accumulation, processes)."
    )
    lr_scheduler: LrScheduler | Literal["auto"] = knob(
        AUTO,
        "Course of the learning rate. `warmup_stable_decay` falls linearly to 0 in the second half of the run; `auto` "
        "takes it where the rate is measured, and `constant` where it is given.",
    )
    lr_warmup_steps: int = knob(
        0, "Updates over which the learning rate rises from 0.", unit="optimiser steps", within="[0, 1e9]"
    )
    lr_num_cycles: int = knob(
        1, "Hard restarts of the cosine_with_restarts schedule.", unit="cycles", within="[1, 1e6]"
    )
    lr_power: float = knob(1.0, "Power of the polynomial schedule.", unit="exponent", within="(0, 100]")
    use_8bit_adam: bool = knob(False, "Keep AdamW's state in 8 bits (bitsandbytes): less memory.")
    adam_beta1: float = knob(0.9, "Decay of the mean of gradients (AdamW, Prodigy).", unit="fraction", within="[0, 1)")
    adam_beta2: float = knob(
        0.999, "Decay of the mean of squared gradients (AdamW, Prodigy).", unit="fraction", within="[0, 1)"
    )
    adam_weight_decay: float = knob(
        1e-4,
        "Decoupled weight decay of the LoRA weights.",
        unit="fraction per unit of learning rate",
        within="[0, 1000]",
    )
    adam_epsilon: float = knob(
        1e-8, "Added to the divisor, which keeps it above 0 (AdamW, Prodigy).", unit="gradient units", within="(0, 1]"
    )
    use_ema: bool = knob(
        False, "Evaluate and save a moving average of the LoRA weights; training goes on with the weights themselves."
    )
    ema_decay: float = knob(
        0.995,
        "Decay of the average with use_ema; after N optimiser steps it is at most N / (9 + N).",
        unit="fraction",
        within="[0, 1)",
    )

    @property
    def schedule(self) -> LrScheduler:
        """The course of the learning rate that is meant."""
        if self.lr_scheduler != AUTO:
            return self.lr_scheduler
        return "warmup_stable_decay" if self.learning_rate == AUTO else "constant"

    def check(self, config: "Config") -> Iterator[str]:
        if self.learning_rate == AUTO and self.scale_lr:
            yield "scale_lr: expected none with learning_rate auto, got true; drop one of the two."
        if self.optimizer != "AdamW":
            yield from self._check_other(config)
        warmup, length = self.lr_warmup_steps, config.training.max_train_steps
        if warmup and self.schedule == "constant":
            yield f"lr_warmup_steps: expected 0 with lr_scheduler constant, got {warmup}; use constant_with_warmup."
        if length is not None and warmup > length:
            yield (
                f"lr_warmup_steps: expected at most max_train_steps ({length}), got {warmup}; lower --lr_warmup_steps."
            )

    def _check_other(self, config: "Config") -> Iterator[str]:
        """Yields what another optimiser than AdamW does not have."""
        name = self.optimizer
        if self.learning_rate == AUTO:
            yield f"learning_rate: expected a number with {name}, got auto, which is measured for AdamW; give a number."
        elif name == "Prodigy" and float(self.learning_rate) < LEAST_PRODIGY_RATE:
            yield (
                f"learning_rate: expected about 1 with Prodigy, which finds the rate and multiplies it by this, got "
                f"{self.learning_rate:g}; give --learning_rate 1."
            )
        if self.use_8bit_adam:
            yield f"use_8bit_adam: expected optimizer AdamW with it, got {name}; drop one of the two."
        if name == "Muon" and config.lora.use_dora:
            yield "use_dora: expected none with Muon, which takes matrices alone, got true; drop one of the two."
        for knob_name in () if name == "Prodigy" else ADAM_KNOBS:
            value, default = getattr(self, knob_name), getattr(OptimizerArguments, knob_name)
            if value != default:
                yield f"{knob_name}: expected none with {name}, got {value:g}; use --optimizer AdamW or Prodigy."


@dataclass(frozen=True)
class ValidationArguments(Group):
    """Validation: images while training, and the comparison of base and adapter"""

    validation_prompt: tuple[str, ...] | None = knob(
        None, "One or more prompts drawn at fixed seeds while training; null means none.", found="words"
    )
    num_validation_images: int = knob(4, "Images for each validation prompt.", unit="images", within="[1, 10000]")
    validation_steps: int | None = knob(
        None,
        "How often validation images are drawn; null means only at the end.",
        unit="optimiser steps",
        within="[1, 1e9]",
    )
    evaluation_prompt_path: str | None = knob(
        None, "Unseen prompts on which base and adapter are compared; null means no comparison.", found="prompts"
    )
    num_evaluation_images: int | None = knob(
        None,
        "Images drawn from the base and from the adapter for the comparison; null means a tenth of what training "
        f"draws, at most {MOST_EVALUATION_IMAGES}.",
        unit="images",
        within="[2, 1e6]",
    )
    evaluation_batch_size: int = knob(16, "Images drawn at once in the comparison.", unit="images", within="[1, 4096]")
    evaluation_eta: float = knob(
        0.0,
        "The chain's eta while evaluating; 0 is what a deterministic sampler draws.",
        unit="factor",
        within="[0, 10]",
    )
    evaluation_steps: int | None = knob(
        None,
        "Denoising steps of images that are looked at: in the comparison, in validation and on the card; null means "
        "num_inference_steps.",
        unit="steps",
        within="[1, 1000]",
    )
    evaluation_guidance_scale: float | None = knob(
        None, "Guidance of images that are looked at; null means that of training.", unit="factor", within="[0, 1000]"
    )
    evaluation_resolution: int | None = knob(
        None,
        "Height and width of images that are looked at; null means that of training.",
        unit="pixels",
        within="[1, 16384]",
    )
    evaluation_scheduler: str | None = knob(
        None,
        "Scheduler of images that are looked at, by the name of its class in diffusers, such as "
        "`DPMSolverMultistepScheduler`; null takes the chain's own steps.",
        found="words",
    )
    skip_final_inference: bool = knob(False, "Draw no validation images after training.")

    def check(self, config: "Config") -> Iterator[str]:
        scheduler, sources = self.evaluation_scheduler, config.chain_of_thought.sources()
        if scheduler is not None and self.evaluation_eta:
            yield (
                f"evaluation_eta: expected 0 with evaluation_scheduler, which has noise of its own or none, got "
                f"{self.evaluation_eta:g}; drop one of the two."
            )
        if scheduler is not None and sources:
            yield (
                f"evaluation_scheduler: expected none with {sources[0]}, whose prompts change within the chain, got "
                f"{scheduler}; drop --evaluation_scheduler."
            )


@dataclass(frozen=True)
class CheckpointingArguments(Group):
    """Checkpointing: saving the state and resuming from it"""

    checkpointing_steps: int | None = knob(
        None,
        f"How often a checkpoint is saved; null means every tenth of the run, and every {LONGEST_UNSAVED} at most.",
        unit="optimiser steps",
        within="[1, 1e9]",
    )
    checkpoints_total_limit: int | None = knob(
        None, "Checkpoints kept, the oldest go first; null means all.", unit="checkpoints", within="[1, 1e6]"
    )
    resume_from_checkpoint: str | None = knob(
        None, "Checkpoint to go on from: `latest`, a name such as `checkpoint-500`, or a path."
    )

    def check(self, config: "Config") -> Iterator[str]:
        given = self.resume_from_checkpoint
        if given is None or len(PurePath(given).parts) == 1:
            return
        if not any(map(os.path.isdir, (Path(given), Path(config.training.output_dir) / given))):
            yield f"resume_from_checkpoint: expected latest, a name or an existing folder, got {given}; check the path."


@dataclass(frozen=True)
class HubArguments(Group):
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
        "Access token, never shown or saved, with the right to write where it publishes; null takes that of HF_TOKEN "
        "or `hf auth login`.",
        secret=True,
    )
    hub_private_repo: bool = knob(False, "Make the repository a private one; one that exists must be private.")
    hub_revision: str | None = knob(None, "Branch to publish on, made when missing; null means main.", found="words")
    push_every: int | None = knob(
        None,
        "How often a checkpoint is saved and its adapter published while training, on a branch `checkpoint-STEP`; null "
        "means never.",
        unit="optimiser steps",
        within="[1, 1e9]",
    )

    def check(self, config: "Config") -> Iterator[str]:
        if self.hub_revision is not None:
            yield from check_revision("hub_revision", self.hub_revision)
        if self.push_every is not None and not self.push_to_hub:
            yield f"push_every: expected push_to_hub with it, got {self.push_every} alone; give --push_to_hub too."


@dataclass(frozen=True)
class LoggingArguments(Group):
    """Logging: where the curves go"""

    logging_dir: str = knob("logs", "Folder of the tracker's files, inside output_dir.")
    report_to: Literal["tensorboard", "wandb", "trackio", "swanlab", "all", "none"] = knob(
        "none",
        "Tracker that receives config, curves and images; it needs the extra of its name. `all` takes every one of "
        "accelerate's trackers that is installed.",
    )
    tracker_name: str = knob("rlr-lora", "Name of the run's project in the tracker.")

    def check(self, config: "Config") -> Iterator[str]:
        for name, inside in (("logging_dir", self.logging_dir), ("tracker_name", self.tracker_name)):
            if not stays_inside(inside):
                yield f"{name}: expected a relative folder inside output_dir, got {inside}; drop the leading part."
