"""What methods that estimate the gradient share: bases with the knobs of a kind of term, and what cannot be run."""

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from rlr_peft.config.chain import AUTO, window_steps
from rlr_peft.config.knob import Group, knob, preset

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config


@dataclass(frozen=True)
class EstimatorArguments(Group):
    """Estimator: how the gradient of the reward is estimated; every method has knobs of its own"""

    estimator: ClassVar[str]
    """The method's name."""
    made_by: ClassVar[str]
    """Module in `rlr_peft.estimators` and class of the estimator that these knobs are of."""
    normalizes_groups: ClassVar[bool] = False
    """Whether its advantages are rewards divided by their standard deviation within a prompt's group."""
    differentiates_reference: ClassVar[bool] = False
    """Whether the reference itself is differentiated, and not only asked."""
    trains_steps_alone: ClassVar[bool] = False
    """Whether the steps that train may differ from update to update: each counts by itself, and none is measured."""

    calibration_samples: int = knob(
        16,
        "Images for one measurement of the variances of the steps, and for the first scales of several rewards; a "
        "short run takes fewer, and `auto` in a very short one measures nothing.",
        unit="images",
        within="[2, 100000]",
    )

    @classmethod
    def knobs(cls) -> dict[str, tuple[Any, Field[Any]]]:
        """Type and field of every knob of the method."""
        types = get_type_hints(cls)
        return {field.name: (types[field.name], field) for field in fields(cls)}

    @property
    def antithetic(self) -> bool:
        """Whether samples come in neighbouring pairs with antithetic noise."""
        return False

    @property
    def calibration(self) -> "MeasuringArguments | None":
        """How the steps are measured; None for a method that measures nothing."""
        return None

    @property
    def covered_tail(self) -> int:
        """Number K of last steps known to be covered by the first-order term; 0 where only the estimator can tell."""
        return 0

    def has_score_terms(self, num_inference_steps: int) -> bool:
        """Whether score terms (half order with a leave-one-out advantage) are used on some step."""
        return False

    def fine_knobs(self, of: type["EstimatorArguments"]) -> dict[str, Any]:
        """The knobs that do not make a method another one, as far as `of` has them too."""
        names = [field.name for field in fields(self) if field.metadata["fine"] and field.name in of.knobs()]
        return {name: getattr(self, name) for name in names}


def at_most_all_steps(config: "Config", name: str, value: object) -> Iterator[str]:
    """Yields what is wrong with a number of steps of the chain."""
    steps = config.chain.num_inference_steps
    if isinstance(value, int) and value > steps:
        yield f"{name}: expected at most num_inference_steps ({steps}), got {value}; lower --{name}."


@dataclass(frozen=True)
class MirroredArguments(EstimatorArguments):
    """Methods whose samples may be mirrored."""

    antithetic: bool = knob(
        False, "Sample in pairs with antithetic noise, z and -z (groups of 4 or more, an even number)."
    )

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        group, batch = config.training.compared_images, config.training.train_batch_size
        if self.antithetic and (group % 2 or group < 4 or batch % 2):
            yield (
                f"antithetic: expected pairs, that is an even train_batch_size and an even num_images_per_prompt of 4 "
                f"or more, got {batch} and {group}; change them."
            )


@dataclass(frozen=True)
class PathwiseArguments(MirroredArguments):
    """Backpropagation through the chain."""

    made_by = "pathwise.PathwiseEstimator"

    fo_coefficient: float = knob(
        1.0, "Factor of the first-order term; not 1 is biased.", unit="factor", within="[0, 1e6]"
    )


@dataclass(frozen=True)
class ScoreTermArguments(EstimatorArguments):
    """Methods with score terms: on every step, or on some that are drawn."""

    ho_blocks: int | Literal["all"] = knob(
        "all",
        "Steps drawn for each micro-batch, weighted to stay unbiased; `all` takes every step.",
        unit="steps",
        within="[1, 1000]",
    )
    ho_window: tuple[int | str, ...] | None = knob(
        None,
        "From where `ho_start: window` draws: first and last step `a b`, counted from 1 (clean) to T (noise); a stage "
        "of the Chain-of-Thought by name; or, with methods that measure, `auto` for the stage with the largest "
        "gradient energy.",
        unit="steps",
    )

    @property
    def ho_start(self) -> Literal["uniform", "gradient-norm", "window"]:
        """How the steps are drawn."""
        return "uniform"

    def has_score_terms(self, num_inference_steps: int) -> bool:
        """Not where the first-order term covers every step, or without blocks."""
        return self.ho_blocks != 0 and self.covered_tail < num_inference_steps

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        noiseless, score_terms = config.chain.why_noiseless, self.has_score_terms(config.chain.num_inference_steps)
        if noiseless and (score_terms or self.mirrors_steps):
            yield (
                f"estimator: expected noise in the chain for the score terms of {self.estimator}, got "
                f"{noiseless}; raise --eta with a stochastic --step_kind, or use --estimator full-bp."
            )
        if score_terms:
            yield from self.check_groups(config)
        if self.ho_blocks == 0:
            return
        if self.ho_window is not None and config.chain.noise_steps is not None:
            yield "ho_window: expected none beside noise_steps, which move, got both; use --noise_window alone."
        if (self.ho_start == "window") != (self.ho_window is not None):
            got = f"ho_start {self.ho_start} and ho_window {list(self.ho_window) if self.ho_window else None}"
            yield f"ho_window: expected together with ho_start window, got {got}; give both or neither."
        if self.ho_window is not None:
            yield from self._check_window(config, self.ho_window)
        if self.ho_start != "uniform" and self.ho_blocks == "all":
            yield (
                f"ho_start: expected a number of ho_blocks to draw, got ho_blocks all, which covers every step "
                f"without drawing; give --ho_blocks 1 or drop --ho_start {self.ho_start}."
            )

    @property
    def mirrors_steps(self) -> bool:
        """Whether antithetic noise is asked for."""
        return False

    def check_groups(self, config: "Config") -> Iterator[str]:
        """Yields what is wrong with the size of a prompt's group."""
        method = config.estimator.estimator  # `auto`, of which this may be a member
        yield from config.training.check_compared(
            method, " For a reward with a gradient there is --estimator full-bp too, which compares none."
        )

    def _check_window(self, config: "Config", window: tuple[int | str, ...]) -> Iterator[str]:
        try:
            stages = config.chain_of_thought.stages()
            resolved = window_steps(window, config.chain.num_inference_steps, stages)
        except ValueError as error:
            yield f"ho_window: {error}, got {' '.join(map(str, window))}; write --ho_window a b."
            return
        if resolved is None:
            if self.calibration is None:
                yield (f"ho_window: expected steps or a stage with {self.estimator}, got {AUTO}; use --estimator rlr.")
            return
        first, last = resolved
        # Of a stage, whose ends nobody chose, the part beyond the tail is enough.
        if (first if isinstance(window[0], int) else last) <= self.covered_tail:
            yield (
                f"ho_window: expected steps above the {self.covered_tail} last ones, which are covered already, "
                f"got {first} {last}; raise its first step."
            )


@dataclass(frozen=True)
class MeasuringArguments(MirroredArguments):
    """Methods that measure the gradients of every step."""

    calibration_interval: int | Literal["auto"] = knob(
        "auto",
        "How often the steps are measured again; `auto` spends about 5 % of the run on it.",
        unit="optimiser steps",
        within="[1, 1e9]",
        fine=True,
    )
    calibration_decay: float = knob(
        0.5,
        "Weight of the past in the running means of the per-step variances.",
        unit="fraction",
        within="[0, 1)",
        fine=True,
    )

    @property
    def calibration(self) -> "MeasuringArguments":
        """How the steps are measured."""
        return self


@dataclass(frozen=True)
class CalibratedArguments(MeasuringArguments, ScoreTermArguments):
    """Methods that may measure the steps, and whose samples serve one optimiser step."""

    made_by = "rlr.RLREstimator"

    ho_start: Literal["uniform", "gradient-norm", "window"] = knob(
        "uniform",
        "How the start of a half-order block is drawn: evenly, by running gradient norms, or from ho_window.",
    )
    black_box_steps: int | Literal["auto"] = knob(
        0,
        "For a reward without gradient: how many last steps are covered by differences of rewards; 0 is off, `auto` as "
        "many as about double the cost.",
        unit="steps",
        within="[0, 1000]",
    )
    state_baseline: bool = knob(
        False,
        "Subtract the reward of the predicted image from the advantages of score terms: one reward call more per step.",
    )
    ho_coefficient: float = knob(1.0, "Factor of the score terms; not 1 is biased.", unit="factor", within="[0, 1e6]")

    @property
    def mirrors_steps(self) -> bool:
        """Whether antithetic noise is asked for, and not left to what the reward needs."""
        return self.black_box_steps not in (0, "auto")

    def check(self, config: "Config") -> Iterator[str]:
        yield from super().check(config)
        yield from at_most_all_steps(config, "black_box_steps", self.black_box_steps)


@dataclass(frozen=True)
class ThreeOrdersArguments(CalibratedArguments):
    """First, half and zeroth order."""

    fo_steps: int | Literal["auto"] = knob(
        "auto",
        "Number K of last steps covered by the first-order term; `auto` measures the best K.",
        unit="steps",
        within="[0, 1000]",
    )
    ho_blocks: int | Literal["all"] = knob(
        "all",
        "Half-order blocks drawn for each micro-batch, weighted to stay unbiased; `all` takes every remaining step, 0 "
        "leaves the half order out.",
        unit="blocks",
        within="[0, 1000]",
    )
    ho_length: int | Literal["auto"] = knob(
        1,
        "Length h of a half-order block; `auto` derives it from nfe_budget and memory_budget.",
        unit="steps",
        within="[1, 1000]",
    )
    zo: Literal["none", "one-point", "two-point"] = knob(
        "none", "Zeroth-order term on the steps that no other term covers."
    )
    zo_scale: float = knob(
        0.01,
        "Standard deviation s of the zeroth-order parameter perturbation.",
        unit="LoRA weight units",
        within="(0, 1000]",
        fine=True,
    )
    zo_samples: int = knob(
        1, "Parameter perturbations drawn for each update.", unit="perturbations", within="[1, 10000]", fine=True
    )
    fo_coefficient: float = preset(PathwiseArguments, "fo_coefficient", 1.0)
    zo_coefficient: float = knob(
        1.0, "Factor of the zeroth-order term; not 1 is biased.", unit="factor", within="[0, 1e6]"
    )
    nfe_budget: float | None = knob(
        None,
        "Compute that `ho_length: auto` may spend.",
        unit="denoiser evaluations per sample and optimiser step",
        within="(0, 1e9]",
    )
    memory_budget: float | None = knob(
        None,
        "Peak memory that `ho_length: auto` may use, by the paper's rule for a tape of h steps.",
        unit="GB",
        within="(0, 1e6]",
    )
    ho_step_memory: float | None = knob(
        None, "Memory of one half-order step on the tape, for memory_budget.", unit="GB", within="(0, 1e6]"
    )
    zo_step_memory: float | None = knob(
        None, "Memory of one zeroth-order step, for memory_budget.", unit="GB", within="[0, 1e6]"
    )

    @property
    def covered_tail(self) -> int:
        """K, if it is given."""
        return self.fo_steps if isinstance(self.fo_steps, int) else 0

    @property
    def fo_roulette(self) -> bool:
        """Whether every sample is walked through a random number of first-order steps; not unless there is a choice."""
        return False

    @property
    def step_choice(self) -> Literal["crossing", "inverse-variance"]:
        """What is measured: K, unless the method has the choice."""
        return "crossing"

    @property
    def zo_chains(self) -> int:
        """Chains that the zeroth-order term of one update samples."""
        return {"none": 0, "one-point": 1, "two-point": 2}[self.zo] * self.zo_samples

    def check(self, config: "Config") -> Iterator[str]:
        too_many = list(at_most_all_steps(config, "fo_steps", self.fo_steps))
        yield from too_many or super().check(config)
        if self.ho_blocks != 0:
            yield from self._check_length(config)
        elif given := [name for name in ("ho_length", "ho_start", "ho_window") if not self._is_default(name)]:
            yield f"{given[0]}: expected none with ho_blocks 0 (no half-order term), got one; drop --{given[0]}."
        elif self.fo_steps == "auto":
            yield "fo_steps: expected a number with ho_blocks 0, got auto, which needs score terms; give --fo_steps K."
            return
        if self.zo == "none":
            return
        if self.ho_blocks not in (0, 1):
            yield (
                f"ho_blocks: expected 0 or 1 with a zeroth-order term ({self.zo} zo), which covers what one drawn "
                f"block leaves, got {self.ho_blocks}; give --ho_blocks 1 or --zo none."
            )
        elif self.fo_steps == "auto":
            yield (
                f"fo_steps: expected a number beside a zeroth-order term ({self.zo} zo), because auto compares with "
                "score terms on all other steps, got auto; give --fo_steps K or --estimator rlr-paper."
            )

    def _is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == getattr(type(self), name))

    def _check_length(self, config: "Config") -> Iterator[str]:
        length, steps, tail = self.ho_length, config.chain.num_inference_steps, self.covered_tail
        budgets = [name for name in ("nfe_budget", "memory_budget") if not self._is_default(name)]
        if length == "auto" and not budgets:
            yield "ho_length: expected a budget beside auto, got none; give --nfe_budget or --memory_budget."
        if self.memory_budget is not None:
            half, zeroth = self.ho_step_memory, self.zo_step_memory
            if half is None or zeroth is None or half <= zeroth:
                yield (
                    f"ho_step_memory: expected a larger number than zo_step_memory beside memory_budget, "
                    f"got {half} and {zeroth}; give both (`--ho_step_memory GB --zo_step_memory GB`)."
                )
        if isinstance(length, int) and not self._is_default("ho_length"):
            if length > steps - tail:
                yield (
                    f"ho_length: expected at most {steps - tail} (num_inference_steps {steps} minus {tail} covered "
                    f"last steps), got {length}; lower --ho_length or raise --num_inference_steps."
                )
            if budgets:
                yield f"{budgets[0]}: expected only with ho_length auto, got ho_length {length}; drop one of the two."
