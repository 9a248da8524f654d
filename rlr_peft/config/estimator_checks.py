"""What can be known to be impossible of an estimator from the configuration alone.

Presets are resolved by the estimators; here they are only held against the knobs that are given beside them. Each check
yields one sentence per problem: what was expected, what was got, what to do.
"""

from collections.abc import Iterator

from rlr_peft.config.arguments import ChainArguments, Config, EstimatorArguments
from rlr_peft.config.chain_of_thought import stages_from_config, window_steps

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
    for knob, value in (("fo_steps", fo_steps), ("black_box_steps", black_box)):
        if isinstance(value, int) and value > steps:
            yield f"{knob}: expected at most num_inference_steps ({steps}), got {value}; lower --{knob}."
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
    for knob in ("fo_coefficient", "ho_coefficient", "zo_coefficient"):
        if getattr(estimator, knob) != 1 and name in ("refl", *_REUSES_SAMPLES):
            yield f"{knob}: expected 1 with {name}, got {getattr(estimator, knob):g}; use --estimator rlr."
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
