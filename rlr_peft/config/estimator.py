"""The gradient estimators, and what keeps the adapter near its base: knobs, and what of them cannot be together.

Presets are resolved by the estimators; here they are only held against the knobs that are given beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlr_peft.config.chain import ChainArguments, stages_from_config, window_steps
from rlr_peft.config.knob import knob

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config

EstimatorName = Literal["rlr", "rlr-paper", "full-bp", "truncated-bp", "reinforce", "ddpo", "grpo", "d3po", "refl"]


@dataclass(frozen=True)
class EstimatorArguments:
    """Estimator: how the gradient of the reward is estimated (null leaves a knob to the preset)"""

    estimator: EstimatorName = knob("rlr", "Method; the knobs below override its parts.")
    fo_steps: int | Literal["auto", "random"] | None = knob(
        None,
        "Number K of last steps covered by the first-order term; `auto` measures the best K, `random` (truncated-bp) "
        "draws it for every micro-batch. With refl the step is drawn from the last K.",
        unit="steps",
        at_least=0,
        at_most=1000,
    )
    step_choice: Literal["crossing", "inverse-variance"] = knob(
        "crossing",
        "What `fo_steps: auto` measures: one K, or a weight for every step that mixes first and half order.",
    )
    ho_length: int | Literal["auto"] | None = knob(
        None,
        "Length h of a half-order block; `auto` derives it from nfe_budget and memory_budget.",
        unit="steps",
        at_least=1,
        at_most=1000,
    )
    ho_blocks: int | Literal["all"] | None = knob(
        None,
        "Half-order blocks (with ddpo, grpo and d3po: trained steps) drawn for each micro-batch, weighted to stay "
        "unbiased; `all` takes every remaining step, 0 leaves the half order out.",
        unit="blocks",
        at_least=0,
        at_most=1000,
    )
    ho_start: Literal["uniform", "gradient-norm", "window"] | None = knob(
        None, "How the start of a half-order block is drawn: evenly, by running gradient norms, or from ho_window."
    )
    ho_window: tuple[int | str, ...] | None = knob(
        None,
        "From where `ho_start: window` draws: first and last step `a b`, counted from 1 (clean) to T (noise); a stage "
        "of the Chain-of-Thought by name; or `auto` for the stage with the largest measured gradient energy.",
        unit="steps",
    )
    zo: Literal["none", "one-point", "two-point"] | None = knob(
        None, "Zeroth-order term on the steps that no other term covers."
    )
    zo_scale: float = knob(
        0.01,
        "Standard deviation s of the zeroth-order parameter perturbation.",
        unit="LoRA weight units",
        above=0,
        at_most=1000,
    )
    zo_samples: int = knob(
        1, "Parameter perturbations drawn for each update.", unit="perturbations", at_least=1, at_most=10_000
    )
    black_box_steps: int | None = knob(
        None,
        "Number of last steps covered by reward differences where the reward has no gradient; 0 is off, null (with "
        "rlr) as many as about double the cost.",
        unit="steps",
        at_least=0,
        at_most=1000,
    )
    state_baseline: bool = knob(
        False, "Take the reward of the predicted image off the score terms' advantages: one reward call per step used."
    )
    antithetic: bool = knob(
        False, "Sample in neighbouring pairs with mirrored noises (groups of 4 or more, an even number)."
    )
    fo_coefficient: float = knob(
        1.0, "Factor of the first-order term; not 1 is biased by choice.", unit="factor", at_least=0, at_most=1e6
    )
    ho_coefficient: float = knob(
        1.0, "Factor of the score terms; not 1 is biased by choice.", unit="factor", at_least=0, at_most=1e6
    )
    zo_coefficient: float = knob(
        1.0, "Factor of the zeroth-order term; not 1 is biased by choice.", unit="factor", at_least=0, at_most=1e6
    )
    normalize_rewards: bool = knob(
        False, "Divide the whole gradient by the running standard deviation of the rewards: all terms alike."
    )
    inner_epochs: int | None = knob(
        None,
        "Optimiser steps of ddpo, grpo and d3po on the same samples.",
        unit="optimiser steps",
        at_least=1,
        at_most=1000,
    )
    clip_range: float = knob(
        0.2,
        "Density ratios of ddpo and grpo are clipped to 1 minus to 1 plus this.",
        unit="ratio of a step",
        above=0,
        at_most=1e6,
    )
    advantage_clip: float = knob(
        5.0,
        "Advantages of ddpo and grpo are clipped to plus or minus this.",
        unit="standard deviations",
        above=0,
        at_most=1e6,
    )
    per_prompt_stat_tracking_buffer_size: int = knob(
        32,
        "Latest rewards of a prompt from which ddpo takes mean and deviation.",
        unit="rewards",
        at_least=2,
        at_most=10**6,
    )
    per_prompt_stat_tracking_min_count: int = knob(
        16,
        "Rewards that a prompt needs for statistics of its own; before, the batch's are used.",
        unit="rewards",
        at_least=2,
        at_most=10**6,
    )
    dpo_beta: float = knob(0.1, "Strength of d3po's pull towards the base model.", unit="1 / nat", above=0, at_most=1e6)
    calibration_interval: int = knob(
        25,
        "How often the per-step variances behind `fo_steps: auto` are measured again.",
        unit="optimiser steps",
        at_least=1,
        at_most=10**9,
    )
    calibration_samples: int = knob(
        16, "Images sampled for one measurement of the per-step variances.", unit="images", at_least=2, at_most=100_000
    )
    calibration_decay: float = knob(
        0.5,
        "Weight of the past in the running means of the per-step variances.",
        unit="fraction",
        at_least=0,
        below=1,
    )
    nfe_budget: float | None = knob(
        None,
        "Compute that `ho_length: auto` may spend.",
        unit="denoiser evaluations per sample and optimiser step",
        above=0,
        at_most=1e9,
    )
    memory_budget: float | None = knob(
        None,
        "Peak memory that `ho_length: auto` may use, by the paper's rule for a tape of h steps.",
        unit="GB",
        above=0,
        at_most=1e6,
    )
    ho_step_memory: float | None = knob(
        None, "Memory of one half-order step on the tape, for memory_budget.", unit="GB", above=0, at_most=1e6
    )
    zo_step_memory: float | None = knob(
        None, "Memory of one zeroth-order step, for memory_budget.", unit="GB", at_least=0, at_most=1e6
    )


@dataclass(frozen=True)
class RegularizationArguments:
    """Regularisation: staying near the base, and stopping in time"""

    kl_beta: float = knob(
        0.0,
        "Weight of the divergence from the base in the objective; 0 is off.",
        unit="reward per nat",
        at_least=0,
        at_most=1e6,
    )
    kl_steps: int | Literal["all"] = knob(
        4,
        "Steps drawn for one estimate of the divergence, weighted to stay unbiased.",
        unit="steps",
        at_least=1,
        at_most=1000,
    )
    kl_interval: int | None = knob(
        None,
        "How often the divergence is measured where it is neither penalised nor limited; null means never.",
        unit="optimiser steps",
        at_least=1,
        at_most=10**9,
    )
    kl_limit: float | None = knob(
        None,
        "Training stops where the divergence from the base, averaged over ten updates, passes this.",
        unit="nats",
        above=0,
        at_most=1e9,
    )
    early_stopping_steps: int | None = knob(
        None,
        "Training stops, and goes back to its best weights, where the held-out reward of so many updates is "
        "significantly below the best so far; null means never.",
        unit="optimiser steps",
        at_least=5,
        at_most=10**9,
    )


_PATHWISE = ("full-bp", "truncated-bp", "refl")
_SCORE_FUNCTION = ("reinforce", "ddpo", "grpo", "d3po")
_REUSES_SAMPLES = ("ddpo", "grpo", "d3po")


def check_estimator(config: Config) -> Iterator[str]:
    """Yields every problem of the estimator's knobs, beside each other and beside the chain's and the batch's."""
    for check in (_noise, _first_order, _half_order, _zeroth_order, _options, _groups):
        yield from check(config)


def why_noiseless(chain: ChainArguments) -> str | None:
    """The knob that takes all noise from the chain, in words; None where there is noise."""
    if chain.step_kind == "ode":
        return "step_kind ode"
    return f"eta {chain.eta}" if chain.eta == 0 else None


def has_score_terms(config: Config) -> bool:
    """Whether the estimator may use score terms (half order with a leave-one-out advantage) on some step."""
    if config.estimator.estimator in _PATHWISE or config.estimator.ho_blocks == 0:
        return False
    return covered_tail(config.estimator) < config.chain.num_inference_steps


def covered_tail(estimator: EstimatorArguments) -> int:
    """Number K of last steps known to be covered by the first-order term; 0 where only the estimator can tell."""
    if isinstance(estimator.fo_steps, int):
        return estimator.fo_steps
    return 1 if estimator.fo_steps is None and estimator.estimator == "rlr-paper" else 0


def free_blocks(estimator: EstimatorArguments) -> int | str:
    """Half-order blocks of an update: the given number, else what the preset implies."""
    if estimator.ho_blocks is not None:
        return estimator.ho_blocks
    return 1 if estimator.estimator == "rlr-paper" else "all"


def _noise(config: Config) -> Iterator[str]:
    noiseless = why_noiseless(config.chain)
    if noiseless and (has_score_terms(config) or config.estimator.black_box_steps):
        yield (
            f"estimator: expected noise in the chain for the score terms of {config.estimator.estimator}, got "
            f"{noiseless}; raise --eta with a stochastic --step_kind, or use --estimator full-bp."
        )


def _first_order(config: Config) -> Iterator[str]:
    estimator, steps = config.estimator, config.chain.num_inference_steps
    name, fo_steps, black_box = estimator.estimator, estimator.fo_steps, estimator.black_box_steps
    for flag, value in (("fo_steps", fo_steps), ("black_box_steps", black_box)):
        if isinstance(value, int) and value > steps:
            yield f"{flag}: expected at most num_inference_steps ({steps}), got {value}; lower --{flag}."
            return
    if name == "full-bp" and fo_steps not in (None, steps):
        yield f"fo_steps: expected {steps} (every step) with full-bp, got {fo_steps}; use --estimator truncated-bp."
    if name in ("truncated-bp", "refl") and fo_steps in (0, "auto"):
        yield f"fo_steps: expected a number of 1 or more with {name}, got {fo_steps}; use --estimator rlr."
    if name in _SCORE_FUNCTION and fo_steps not in (None, 0):
        yield f"fo_steps: expected 0 with {name} (score terms only), got {fo_steps}; use --estimator rlr."
    elif fo_steps == "random" and name not in ("truncated-bp", "full-bp"):
        measured = "" if name == "refl" else " or auto"
        yield f"fo_steps: expected a number{measured} with {name}, got random; use --estimator truncated-bp."
    if black_box and name in (*_PATHWISE, *_REUSES_SAMPLES):
        yield f"black_box_steps: expected none with {name}, got {black_box}; use --estimator rlr."
    if estimator.step_choice == "inverse-variance":
        yield from _mixture(estimator)


def _mixture(estimator: EstimatorArguments) -> Iterator[str]:
    """Every step is to hold both terms: nothing may be drawn, long or perturbed."""
    measured = estimator.estimator == "rlr" and estimator.fo_steps in (None, "auto")
    plain = estimator.ho_length in (None, 1) and estimator.ho_blocks in (None, "all") and estimator.zo in (None, "none")
    if not (measured and plain and not estimator.state_baseline):
        yield (
            "step_choice: expected crossing where K is given or the half order is not plain single steps, got "
            "inverse-variance; drop fo_steps, ho_length, ho_blocks, zo and state_baseline, or the step_choice."
        )


def _half_order(config: Config) -> Iterator[str]:
    estimator = config.estimator
    name, length, window = estimator.estimator, estimator.ho_length, estimator.ho_window
    given = [
        knob for knob in ("ho_length", "ho_blocks", "ho_start", "ho_window") if getattr(estimator, knob) is not None
    ]
    if estimator.ho_blocks == 0:
        others = [knob for knob in given if knob != "ho_blocks"]
        if name in (*_PATHWISE, *_SCORE_FUNCTION):
            yield f"ho_blocks: expected steps to train or none of this knob with {name}, got 0; drop --ho_blocks."
        elif others:
            yield f"{others[0]}: expected none with ho_blocks 0 (no half-order term), got one; drop --{others[0]}."
        elif name == "rlr" and estimator.fo_steps in (None, "auto"):
            yield "fo_steps: expected a number with ho_blocks 0, got auto, which needs score terms; give --fo_steps K."
        return
    if name in _PATHWISE:
        if given:
            got = getattr(estimator, given[0])
            yield f"{given[0]}: expected none with {name} (no half-order term), got {got}; use --estimator rlr."
        return
    if name in _SCORE_FUNCTION and length not in (None, 1):
        yield f"ho_length: expected 1 with {name}, got {length}; use --estimator rlr for longer blocks."
    if name in _REUSES_SAMPLES and estimator.ho_start == "gradient-norm":
        yield f"ho_start: expected uniform or window with {name}, got gradient-norm; use --estimator rlr."
    yield from _length(config)
    if (estimator.ho_start == "window") != (window is not None):
        got = f"ho_start {estimator.ho_start} and ho_window {list(window) if window else None}"
        yield f"ho_window: expected together with ho_start window, got {got}; give both or neither."
    if window is not None:
        yield from _window(config, window)
    if estimator.ho_start is not None and free_blocks(estimator) == "all":
        yield (
            f"ho_start: expected a number of ho_blocks to draw, got ho_blocks all, which covers every step "
            f"without drawing; give --ho_blocks 1 or drop --ho_start {estimator.ho_start}."
        )


def _window(config: Config, window: tuple[int | str, ...]) -> Iterator[str]:
    estimator, given = config.estimator, " ".join(map(str, window))
    try:
        stages = stages_from_config(config)
        resolved = window_steps(window, config.chain.num_inference_steps, stages)
    except ValueError as error:
        yield f"ho_window: {error}, got {given}; write --ho_window a b."
        return
    tail = covered_tail(estimator)
    # Of a stage, whose ends nobody chose, the part beyond the tail is enough.
    lowest = resolved if resolved is None or isinstance(window[0], int) else (resolved[1], resolved[1])
    if lowest is not None and resolved is not None and lowest[0] <= tail:
        yield (
            f"ho_window: expected steps above the {tail} last ones, which are covered already, "
            f"got {resolved[0]} {resolved[1]}; raise its first step."
        )
    if resolved is None and estimator.estimator not in ("rlr", "rlr-paper", "reinforce"):
        yield f"ho_window: expected steps or a stage with {estimator.estimator}, got auto; use --estimator rlr."


def _length(config: Config) -> Iterator[str]:
    estimator, steps = config.estimator, config.chain.num_inference_steps
    length, tail = estimator.ho_length, covered_tail(estimator)
    budgets = [knob for knob in ("nfe_budget", "memory_budget") if getattr(estimator, knob) is not None]
    if length == "auto" and not budgets:
        yield "ho_length: expected a budget beside auto, got none; give --nfe_budget or --memory_budget."
    if estimator.memory_budget is not None:
        half, zeroth = estimator.ho_step_memory, estimator.zo_step_memory
        if half is None or zeroth is None or half <= zeroth:
            yield (
                f"ho_step_memory: expected a larger number than zo_step_memory beside memory_budget, "
                f"got {half} and {zeroth}; give both (`--ho_step_memory GB --zo_step_memory GB`)."
            )
    if isinstance(length, int):
        if length > steps - tail:
            yield (
                f"ho_length: expected at most {steps - tail} (num_inference_steps {steps} minus {tail} covered last "
                f"steps), got {length}; lower --ho_length or raise --num_inference_steps."
            )
        if budgets:
            yield f"{budgets[0]}: expected only with ho_length auto, got ho_length {length}; drop one of the two."


def _zeroth_order(config: Config) -> Iterator[str]:
    estimator = config.estimator
    name = estimator.estimator
    zo = estimator.zo or ("the preset's" if name == "rlr-paper" else "none")
    if zo == "none":
        return
    if name in (*_PATHWISE, *_SCORE_FUNCTION):
        yield f"zo: expected none with {name}, got {zo}; use --estimator rlr-paper."
    elif free_blocks(estimator) not in (0, 1):
        yield (
            f"ho_blocks: expected 0 or 1 with a zeroth-order term ({zo} zo), which covers what one drawn block leaves, "
            f"got {free_blocks(estimator)}; give --ho_blocks 1 or --zo none."
        )
    elif estimator.fo_steps == "auto" or (estimator.fo_steps is None and name == "rlr"):
        yield (
            f"fo_steps: expected a number beside a zeroth-order term ({zo} zo), because auto compares with score terms "
            f"on all other steps, got auto; give --fo_steps K or --estimator rlr-paper."
        )


def _options(config: Config) -> Iterator[str]:
    estimator = config.estimator
    name = estimator.estimator
    if estimator.inner_epochs is not None and name not in _REUSES_SAMPLES:
        yield (
            f"inner_epochs: expected none with {name}, whose samples serve one optimiser step, got "
            f"{estimator.inner_epochs}; use --estimator ddpo, grpo or d3po."
        )
    if estimator.state_baseline and name in (*_PATHWISE, *_REUSES_SAMPLES):
        yield f"state_baseline: expected false with {name}, got true; use --estimator rlr."
    if estimator.normalize_rewards and name in _REUSES_SAMPLES:
        yield (
            f"normalize_rewards: expected false with {name}, whose gradient does not grow with the rewards as it is, "
            f"got true; drop it."
        )
    for flag in ("fo_coefficient", "ho_coefficient", "zo_coefficient"):
        if getattr(estimator, flag) != 1 and name in ("refl", *_REUSES_SAMPLES):
            yield f"{flag}: expected 1 with {name}, got {getattr(estimator, flag):g}; use --estimator rlr."
    size, count = estimator.per_prompt_stat_tracking_buffer_size, estimator.per_prompt_stat_tracking_min_count
    if count > size:
        yield (
            f"per_prompt_stat_tracking_min_count: expected at most per_prompt_stat_tracking_buffer_size ({size}), "
            f"got {count}; lower it."
        )


def _groups(config: Config) -> Iterator[str]:
    name, training = config.estimator.estimator, config.training
    group, batch = training.num_images_per_prompt, training.train_batch_size
    if config.estimator.antithetic:
        if name in _REUSES_SAMPLES:
            yield f"antithetic: expected false with {name}, got true; use --estimator rlr."
        elif group % 2 or group < 4 or batch % 2:
            yield (
                f"antithetic: expected pairs, that is an even train_batch_size and an even num_images_per_prompt of 4 "
                f"or more, got {batch} and {group}; change them."
            )
    if name == "d3po" and (group % 2 or batch % 2):
        yield (
            f"num_images_per_prompt: expected pairs with d3po, that is an even number beside an even "
            f"train_batch_size, got {group} and {batch}; change them."
        )
    elif name != "ddpo" and group == 1 and has_score_terms(config):
        yield (
            f"num_images_per_prompt: expected 2 or more with {config.estimator.estimator}, whose score terms compare "
            f"the images of a prompt with each other (leave-one-out), got 1; raise it or use --estimator full-bp."
        )
