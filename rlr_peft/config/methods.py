"""The methods that estimate the gradient, one class with its own knobs for each; `--estimator` chooses among them.

A method's defaults are its preset. Methods that share knobs share a base; a knob that a method redeclares has another
default, range or meaning there.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlr_peft.config.estimator import (
    CalibratedArguments,
    EstimatorArguments,
    MeasuringArguments,
    MirroredArguments,
    PathwiseArguments,
    ThreeOrdersArguments,
    at_most_all_steps,
)
from rlr_peft.config.knob import knob, preset
from rlr_peft.config.policy import AWMArguments, D3POArguments, DDPOArguments, GRPOArguments, NFTArguments, RAMArguments

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config


@dataclass(frozen=True)
class RLRArguments(ThreeOrdersArguments):
    """Unbiased: pathwise up to a measured step, single-step score terms beyond it."""

    estimator = "rlr"

    step_choice: Literal["crossing", "inverse-variance"] = knob(
        "crossing",
        "What `fo_steps: auto` measures: one K, or a weight for every step that mixes first and half order.",
    )
    black_box_steps: int | Literal["auto"] = preset(CalibratedArguments, "black_box_steps", "auto")
    fo_roulette: bool = knob(
        True,
        "Backpropagate each sample through a random number of the K steps, weighted to stay unbiased; with "
        "`step_choice inverse-variance` or LoRA dropout, through all of them.",
        fine=True,
    )

    def check(self, config: "Config") -> Iterator[str]:
        """Yields what is wrong with the terms; in a mixture, every step is to hold both: none drawn or perturbed."""
        yield from super().check(config)
        plain = self.ho_length == 1 and self.ho_blocks == "all" and self.zo == "none" and not self.state_baseline
        if self.step_choice == "inverse-variance" and not (plain and self.fo_steps == "auto"):
            yield (
                "step_choice: expected crossing where K is given or the half order is not plain single steps, got "
                "inverse-variance; drop fo_steps, ho_length, ho_blocks, zo and state_baseline, or the step_choice."
            )


@dataclass(frozen=True)
class AutoArguments(MeasuringArguments):
    """The default: what promises the most improvement per cost, `rlr` among them; without a gradient `ram`."""

    estimator = "auto"
    made_by = "auto.AutoEstimator"

    fo_roulette: bool = preset(RLRArguments, "fo_roulette", True)

    @property
    def rlr(self) -> RLRArguments:
        """The unbiased member."""
        return RLRArguments(**{name: getattr(self, name) for name in self.knobs()})

    def has_score_terms(self, num_inference_steps: int) -> bool:
        return self.rlr.has_score_terms(num_inference_steps)

    def check(self, config: "Config") -> Iterator[str]:
        yield from self.rlr.check(config)


@dataclass(frozen=True)
class RLRPaperArguments(ThreeOrdersArguments):
    """The paper's form with its formula corrected: one FO step, one free block of length h, ZO on the complement."""

    estimator = "rlr-paper"

    fo_steps: int | Literal["auto"] = preset(ThreeOrdersArguments, "fo_steps", 1)
    ho_length: int | Literal["auto"] = preset(ThreeOrdersArguments, "ho_length", 2)
    ho_blocks: int | Literal["all"] = preset(ThreeOrdersArguments, "ho_blocks", 1)
    zo: Literal["none", "one-point", "two-point"] = preset(ThreeOrdersArguments, "zo", "two-point")


@dataclass(frozen=True)
class FullBPArguments(PathwiseArguments):
    """Backpropagation through all steps."""

    estimator = "full-bp"


@dataclass(frozen=True)
class TruncatedBPArguments(PathwiseArguments):
    """Backpropagation through the last steps."""

    estimator = "truncated-bp"

    fo_steps: int | Literal["random"] = knob(
        1,
        "Number K of last steps that are differentiated; `random` draws it for every micro-batch.",
        unit="steps",
        within="[1, 1000]",
    )

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        yield from at_most_all_steps(config, "fo_steps", self.fo_steps)


@dataclass(frozen=True)
class DRaFTLVArguments(PathwiseArguments):
    """The last step, also from re-noised copies of every image (DRaFT-LV)."""

    estimator = "draft-lv"

    renoised_copies: int = knob(
        2, "Re-noised copies of every image, each with a reward of its own.", unit="images", within="[1, 100]"
    )


@dataclass(frozen=True)
class DrawnStepsArguments(PathwiseArguments):
    """Some steps of the whole chain, reached with the denoiser's velocity held fixed."""

    weighs_by_noise: ClassVar[bool] = False
    """Whether a step's weight is 0 without noise."""

    fo_steps: int = knob(3, "Number K of steps that are differentiated.", unit="steps", within="[1, 1000]")

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        yield from at_most_all_steps(config, "fo_steps", self.fo_steps)
        if self.weighs_by_noise and (why := config.chain.why_noiseless):
            yield (
                f"estimator: expected noise in the chain with {self.estimator}, got {why}; raise --eta with a "
                "stochastic --step_kind, or use --estimator full-bp."
            )


@dataclass(frozen=True)
class DRTuneArguments(DrawnStepsArguments):
    """Evenly spaced steps, and the reward of the image predicted at a late one (DRTune)."""

    estimator = "drtune"

    stop_share: float = knob(
        0.4,
        "The step whose prediction is rewarded is drawn from this share of last steps.",
        unit="fraction",
        within="(0, 1]",
    )


@dataclass(frozen=True)
class LeapArguments(PathwiseArguments):
    """Two drawn steps, each taken as one leap (LeapAlign)."""

    estimator = "leap"

    fo_carry: float = knob(
        0.3,
        "Factor of the gradient that passes through the denoiser at one of the steps; 0 holds the velocity there too.",
        unit="factor",
        within="[0, 1]",
    )

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        if config.chain.num_inference_steps < 2:
            yield "num_inference_steps: expected 2 or more with leap, got 1; raise it."


@dataclass(frozen=True)
class FlowBPSparseArguments(DrawnStepsArguments):
    """Drawn steps, weighted for those left out (FlowBP-Sparse)."""

    estimator = "flowbp-sparse"

    step_density: float = knob(
        1.5,
        "Steps are drawn in proportion to (T - t + 1) to this power; 0 draws evenly.",
        unit="power",
        within="[0, 100]",
    )
    step_correction: float = knob(
        1.0,
        "How far the drawn steps stand in for the others: 0 not at all, 1 in full.",
        unit="fraction",
        within="[0, 1]",
    )


@dataclass(frozen=True)
class FlowBPBridgeArguments(FlowBPSparseArguments):
    """Drawn steps, one of which the gradient passes through the denoiser (FlowBP-Bridge)."""

    estimator = "flowbp-bridge"

    fo_steps: int = preset(DrawnStepsArguments, "fo_steps", 5)
    fo_carry: float = preset(LeapArguments, "fo_carry", 0.5)


@dataclass(frozen=True)
class RSMArguments(DrawnStepsArguments):
    """Drawn steps weighted by their noise, with a clipped reward gradient (RSM, first order)."""

    estimator = "rsm"
    weighs_by_noise = True


@dataclass(frozen=True)
class AdjointMatchingArguments(DrawnStepsArguments):
    """Drawn steps that follow the reward's gradient carried through the base (adjoint matching)."""

    estimator = "adjoint-matching"
    made_by = "kl.AdjointMatchingEstimator"
    weighs_by_noise = True
    differentiates_reference = True

    reward_scale: float = knob(
        1000.0,
        "The objective is this times the reward minus the divergence from the base in nats.",
        unit="nats per unit of reward",
        within="(0, 1e9]",
    )


@dataclass(frozen=True)
class ReinforceArguments(CalibratedArguments):
    """Score terms alone."""

    estimator = "reinforce"


@dataclass(frozen=True)
class ReFLArguments(MirroredArguments):
    """The reward of the image predicted at one late step, differentiated through that step."""

    estimator = "refl"
    made_by = "pathwise.PathwiseEstimator"

    fo_steps: int | None = knob(
        None,
        "Number K of last steps, of which one is drawn; null means a quarter of them.",
        unit="steps",
        within="[1, 1000]",
    )

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        yield from at_most_all_steps(config, "fo_steps", self.fo_steps)


METHODS: dict[str, type[EstimatorArguments]] = {
    method.estimator: method
    for method in (
        AutoArguments,
        RLRArguments,
        RLRPaperArguments,
        FullBPArguments,
        TruncatedBPArguments,
        DRaFTLVArguments,
        DRTuneArguments,
        LeapArguments,
        FlowBPSparseArguments,
        FlowBPBridgeArguments,
        RSMArguments,
        AdjointMatchingArguments,
        ReinforceArguments,
        DDPOArguments,
        GRPOArguments,
        D3POArguments,
        ReFLArguments,
        RAMArguments,
        NFTArguments,
        AWMArguments,
    )
}
"""Every method by its name."""
DEFAULT_METHOD = AutoArguments.estimator
METHOD_CHOICE: Field[str] = knob(DEFAULT_METHOD, "Method that estimates the gradient; each has options of its own.")
"""The knob that chooses among them."""
