"""The forward-process methods, which train on fresh noisings of the images: knobs, and what cannot be run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlr_peft.config.estimator import EstimatorArguments
from rlr_peft.config.knob import knob, preset
from rlr_peft.config.policy import GRPOArguments, PolicyGradientArguments, ReusedSamplesArguments

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config


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
