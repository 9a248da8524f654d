"""Methods that compare rewards: policy gradients of single steps, pairs, and losses on fresh noisings of the images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlr_peft.config.estimator import EstimatorArguments, ScoreTermArguments
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


@dataclass(frozen=True)
class ForwardArguments(EstimatorArguments):
    """Images are noised afresh, and the denoiser follows those that scored well."""

    made_by = "forward.ForwardEstimator"
    normalizes_groups = True

    noise_levels: int = knob(
        8,
        "Levels, of the sampler's steps, at which every image is noised afresh; all of them if there are fewer.",
        unit="levels",
        within="[1, 1000]",
    )
    level_density: float = knob(
        0.0,
        "Levels are drawn in proportion to their share of noise to this power; 0 draws evenly.",
        unit="power",
        within="[0, 100]",
    )
    advantage_clip: float = preset(PolicyGradientArguments, "advantage_clip", 5.0)
    advantage_std: Literal["prompt", "update"] = preset(GRPOArguments, "advantage_std", "prompt")
    inner_epochs: int = preset(ReusedSamplesArguments, "inner_epochs", 1)
    old_decay: float = knob(
        0.5,
        "Highest decay of the moving average of the adapter's weights that the loss compares with.",
        unit="fraction",
        within="[0, 1)",
    )
    old_decay_growth: float = knob(
        0.001, "After N updates that decay is at most N times this.", unit="fraction per update", within="[0, 1]"
    )
    norm_penalty: float = knob(
        0.0,
        "Weight of the squared excess of the velocity's norm over the base's, against oversaturation; 0 is off.",
        unit="factor",
        within="[0, 1e6]",
    )
    norm_margin: float = knob(0.0, "Excess of the norm that is not penalised.", unit="fraction", within="[0, 100]")

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        yield from config.training.check_compared(self.estimator)
        if config.training.detach_negative:
            yield (
                f"detach_negative: expected none with {self.estimator}, which trains without guidance, got true; drop "
                "--detach_negative."
            )
        if self.norm_margin and not self.norm_penalty:
            yield f"norm_margin: expected only with norm_penalty, got {self.norm_margin:g}; give --norm_penalty."


@dataclass(frozen=True)
class RAMArguments(ForwardArguments):
    """The base's velocity, moved towards images by their advantages, is the target (RAM)."""

    estimator = "ram"

    level_density: float = preset(ForwardArguments, "level_density", 1.0)
    old_decay: float = preset(ForwardArguments, "old_decay", 0.9)
    old_decay_growth: float = preset(ForwardArguments, "old_decay_growth", 0.01)
    reward_scale: float = knob(
        100.0,
        "The target moves by this times the advantage: the larger, the weaker the pull to the base.",
        unit="factor",
        within="(0, 1e9]",
    )


@dataclass(frozen=True)
class BasePulledArguments(ForwardArguments):
    """Losses without a pull to the base of their own."""

    base_pull: float = knob(
        1e-4, "Weight of the squared distance from the base's output.", unit="factor", within="[0, 1e6]"
    )


@dataclass(frozen=True)
class NFTArguments(BasePulledArguments):
    """Good images attract the denoiser, bad ones its mirror image (DiffusionNFT)."""

    estimator = "nft"

    noise_levels: int = preset(ForwardArguments, "noise_levels", 9)
    nft_beta: float = knob(
        1.0, "How far the outputs that are compared lie from the old one.", unit="factor", within="(0, 1]"
    )


@dataclass(frozen=True)
class AWMArguments(BasePulledArguments):
    """A policy gradient with the matching error as likelihood (advantage weighted matching)."""

    estimator = "awm"

    noise_levels: int = preset(ForwardArguments, "noise_levels", 6)
    advantage_clip: float = preset(PolicyGradientArguments, "advantage_clip", 1.0)
    old_decay: float = preset(ForwardArguments, "old_decay", 0.3)
    base_pull: float = preset(BasePulledArguments, "base_pull", 1e-3)
    clip_range: float = preset(PolicyGradientArguments, "clip_range", 1.0)
    old_pull: float = knob(
        1.0, "Weight of the squared distance from the old weights' output.", unit="factor", within="[0, 1e6]"
    )
