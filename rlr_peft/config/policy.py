"""The policy gradients of single steps, which may take several optimiser steps on the same samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlr_peft.config.estimator import ScoreTermArguments
from rlr_peft.config.knob import knob, preset

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config


@dataclass(frozen=True)
class ReusedSamplesArguments(ScoreTermArguments):
    """Methods that take several optimiser steps on the same samples."""

    trains_steps_alone = True

    ho_start: Literal["uniform", "window"] = knob("uniform", "How the steps are drawn: evenly, or from ho_window.")
    inner_epochs: int = knob(1, "Optimiser steps on the same samples.", unit="optimiser steps", within="[1, 1000]")


@dataclass(frozen=True)
class PolicyGradientArguments(ReusedSamplesArguments):
    """Clipped policy gradients."""

    made_by = "policy.PolicyGradientEstimator"

    clip_range: float = knob(
        0.2,
        "Density ratios are clipped to 1 minus to 1 plus this.",
        unit="ratio of a step",
        within="(0, 1e6]",
        fine=True,
    )
    divergence_limit: float | None = knob(
        None,
        "In place of clip_range: a sample's step gives nothing where its divergence from the sampling weights is above "
        "this and its ratio moves further away (Flow-DPPO); null clips.",
        unit="nats, summed over the latents",
        within="(0, 1e9]",
    )
    ratio_norm: bool = knob(
        False,
        "Take the bias off every step's density ratio and bring all steps to one scale, in ratio and gradient "
        "(GRPO-Guard); clip_range bounds that ratio.",
    )
    advantage_clip: float = knob(
        5.0, "Advantages are clipped to plus or minus this.", unit="standard deviations", within="(0, 1e6]", fine=True
    )

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        if self.divergence_limit is not None and self.inner_epochs == 1:
            yield (
                "divergence_limit: expected inner_epochs of 2 or more, without which the sampling weights are the "
                "present ones, got 1; raise --inner_epochs or drop --divergence_limit."
            )
        if self.divergence_limit is not None and self.ratio_norm:
            yield (
                f"divergence_limit: expected none with ratio_norm, which clips, got {self.divergence_limit:g}; drop "
                "one of the two."
            )


@dataclass(frozen=True)
class DDPOArguments(PolicyGradientArguments):
    """Clipped policy gradient with the statistics of a prompt's past rewards."""

    estimator = "ddpo"

    inner_epochs: int = preset(ReusedSamplesArguments, "inner_epochs", 2)
    per_prompt_stat_tracking_buffer_size: int = knob(
        32,
        "Latest rewards of a prompt from which mean and deviation are taken.",
        unit="rewards",
        within="[2, 1e6]",
        fine=True,
    )
    per_prompt_stat_tracking_min_count: int = knob(
        16,
        "Rewards that a prompt needs for statistics of its own; before, the batch's are used.",
        unit="rewards",
        within="[2, 1e6]",
        fine=True,
    )

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        size, count = self.per_prompt_stat_tracking_buffer_size, self.per_prompt_stat_tracking_min_count
        if count > size:
            yield (
                f"per_prompt_stat_tracking_min_count: expected at most per_prompt_stat_tracking_buffer_size ({size}), "
                f"got {count}; lower it."
            )

    def check_groups(self, config: "Config") -> Iterator[str]:
        """Any size will do: rewards are compared with those of the past."""
        yield from ()


@dataclass(frozen=True)
class GRPOArguments(PolicyGradientArguments):
    """Clipped policy gradient with advantages relative to a prompt's group."""

    estimator = "grpo"
    normalizes_groups = True

    advantage_std: Literal["prompt", "update"] = knob(
        "prompt",
        "Whose rewards' standard deviation advantages are divided by: of their prompt, or of the whole update.",
        fine=True,
    )


@dataclass(frozen=True)
class D3POArguments(ReusedSamplesArguments):
    """Direct preference optimisation of pairs."""

    estimator = "d3po"
    made_by = "policy.PreferenceEstimator"

    dpo_beta: float = knob(
        0.1, "Strength of the pull towards the base model.", unit="1 / nat", within="(0, 1e6]", fine=True
    )

    def check_groups(self, config: "Config") -> Iterator[str]:
        training = config.training
        if training.train_batch_size % 2:
            yield (
                "train_batch_size: expected an even number with d3po, which compares the images of a prompt in pairs, "
                f"got {training.train_batch_size}; give --train_batch_size {training.train_batch_size + 1}."
            )
        elif training.compared_images % 2:
            yield (
                "num_images_per_prompt: expected an even number with d3po, which compares the images of a prompt in "
                f"pairs, got {training.compared_images}; give --num_images_per_prompt 2."
            )
