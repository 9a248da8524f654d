"""What can be known to be impossible from the configuration alone, before a model, a reward or torch is loaded.

Each check yields one sentence per problem: what was expected, what was got, what to do. Presets are resolved by the
estimators; here they are only held against the knobs that are given beside them.
"""

import math
import operator
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path, PurePath

from rlr_peft.config.arguments import ChainArguments, Config, EstimatorArguments
from rlr_peft.config.knob import ConfigError

_PATHWISE_PRESETS = ("full-bp", "truncated-bp")
_COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def check_config(config: Config) -> None:
    """Raises one ConfigError that names every problem: the ranges first, and combinations once all ranges hold."""
    problems = list(_ranges(config))
    if not problems:
        for check in (_batches, _noise, _first_order, _half_order, _zeroth_order, _groups, _schedule, _rewards, _paths):
            problems.extend(check(config))
    if len(problems) > 1:
        raise ConfigError("\n".join([f"{len(problems)} problems in the configuration:", *(f"- {p}" for p in problems)]))
    if problems:
        raise ConfigError(problems[0])


def has_score_terms(config: Config) -> bool:
    """Whether the estimator may use score terms (half order with a leave-one-out advantage) on some step."""
    if config.estimator.estimator in _PATHWISE_PRESETS:
        return False
    return covered_tail(config.estimator) < config.chain.num_inference_steps


def covered_tail(estimator: EstimatorArguments) -> int:
    """Number K of last steps known to be covered by the first-order term; 0 where only the estimator can tell."""
    if isinstance(estimator.fo_steps, int):
        return estimator.fo_steps
    return 1 if estimator.fo_steps is None and estimator.estimator == "rlr-paper" else 0


def _ranges(config: Config) -> Iterator[str]:
    for group_field in fields(config):
        group = getattr(config, group_field.name)
        for field in fields(group):
            value = getattr(group, field.name)
            if isinstance(value, str) and not value.strip() and field.name != "negative_prompt":
                yield f"{field.name}: expected a text, got an empty one; fill it or leave the flag out."
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{field.name}: expected a finite number, got {value}; give a number."
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            bounds = {word: bound for word, bound in field.metadata["bounds"].items() if bound is not None}
            if not all(_COMPARISONS[word](value, bound) for word, bound in bounds.items()):
                allowed = " and ".join(f"{word} {bound}" for word, bound in bounds.items())
                yield f"{field.name}: expected {allowed}, got {value}; change --{field.name}."


def _batches(config: Config) -> Iterator[str]:
    training = config.training
    samples = training.train_batch_size * training.gradient_accumulation_steps
    if samples % training.num_images_per_prompt:
        yield (
            f"num_images_per_prompt: expected a divisor of the {samples} samples of an update (train_batch_size "
            f"{training.train_batch_size} x gradient_accumulation_steps {training.gradient_accumulation_steps}), got "
            f"{training.num_images_per_prompt}; change one of the three so that every prompt's group is whole."
        )


def _noise(config: Config) -> Iterator[str]:
    chain, estimator = config.chain, config.estimator
    if chain.step_kind in ("ancestral", "cps"):
        for name, eta in (("eta", chain.eta), ("evaluation_eta", config.validation.evaluation_eta)):
            if eta > 1:
                yield f"{name}: expected 0 to 1 with step_kind {chain.step_kind}, got {eta}; lower --{name}."
    noiseless = _noiseless(chain)
    if noiseless and (has_score_terms(config) or estimator.black_box_steps):
        yield (
            f"estimator: expected noise in the chain for the score terms of {estimator.estimator}, got {noiseless}; "
            f"raise --eta with a stochastic --step_kind, or use --estimator full-bp."
        )


def _noiseless(chain: ChainArguments) -> str | None:
    if chain.step_kind == "ode":
        return "step_kind ode"
    return f"eta {chain.eta}" if chain.eta == 0 else None


def _first_order(config: Config) -> Iterator[str]:
    estimator, steps = config.estimator, config.chain.num_inference_steps
    name, fo_steps, black_box = estimator.estimator, estimator.fo_steps, estimator.black_box_steps
    for knob, value in (("fo_steps", fo_steps), ("black_box_steps", black_box)):
        if isinstance(value, int) and value > steps:
            yield f"{knob}: expected at most num_inference_steps ({steps}), got {value}; lower --{knob}."
            return
    if name == "full-bp" and fo_steps not in (None, steps):
        yield f"fo_steps: expected {steps} (every step) with full-bp, got {fo_steps}; use --estimator truncated-bp."
    if name == "truncated-bp" and fo_steps in (0, "auto"):
        yield f"fo_steps: expected a number of 1 or more with truncated-bp, got {fo_steps}; use --estimator rlr."
    if name == "reinforce" and fo_steps not in (None, 0):
        yield f"fo_steps: expected 0 with reinforce (score terms only), got {fo_steps}; use --estimator rlr."
    if black_box and name in _PATHWISE_PRESETS:
        yield (
            f"black_box_steps: expected none with {name}, which needs the reward's gradient, got {black_box}; "
            f"use --estimator rlr."
        )


def _half_order(config: Config) -> Iterator[str]:
    estimator, steps = config.estimator, config.chain.num_inference_steps
    name, length, window = estimator.estimator, estimator.ho_length, estimator.ho_window
    given = [
        knob for knob in ("ho_length", "ho_blocks", "ho_start", "ho_window") if getattr(estimator, knob) is not None
    ]
    if name in _PATHWISE_PRESETS:
        if given:
            got = getattr(estimator, given[0])
            yield f"{given[0]}: expected none with {name} (no half-order term), got {got}; use --estimator rlr."
        return
    if name == "reinforce" and length not in (None, 1):
        yield f"ho_length: expected 1 with reinforce, got {length}; use --estimator rlr for longer blocks."
    yield from _length(config)
    if (estimator.ho_start == "window") != (window is not None):
        got = f"ho_start {estimator.ho_start} and ho_window {list(window) if window else None}"
        yield f"ho_window: expected together with ho_start window, got {got}; give both or neither."
    if window is not None and not (len(window) == 2 and 1 <= window[0] <= window[1] <= steps):
        yield (
            f"ho_window: expected two steps a b with 1 <= a <= b <= num_inference_steps ({steps}), "
            f"got {' '.join(map(str, window))}; write --ho_window a b."
        )
    elif window is not None and window[0] <= covered_tail(estimator):
        yield (
            f"ho_window: expected steps above the {covered_tail(estimator)} last ones, which are covered already, "
            f"got {window[0]} {window[1]}; raise its first step."
        )
    if estimator.ho_start is not None and free_blocks(estimator) == "all":
        yield (
            f"ho_start: expected a number of ho_blocks to draw, got ho_blocks all, which covers every step "
            f"without drawing; give --ho_blocks 1 or drop --ho_start {estimator.ho_start}."
        )


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


def free_blocks(estimator: EstimatorArguments) -> int | str:
    """Half-order blocks of an update: the given number, else what the preset implies."""
    return estimator.ho_blocks or (1 if estimator.estimator == "rlr-paper" else "all")


def _zeroth_order(config: Config) -> Iterator[str]:
    estimator = config.estimator
    name = estimator.estimator
    zo = estimator.zo or ("the preset's" if name == "rlr-paper" else "none")
    if zo == "none":
        return
    if name in (*_PATHWISE_PRESETS, "reinforce"):
        yield f"zo: expected none with {name}, got {zo}; use --estimator rlr-paper."
    elif free_blocks(estimator) != 1:
        yield (
            f"ho_blocks: expected 1 with a zeroth-order term ({zo} zo), which covers what one drawn block leaves, got "
            f"{free_blocks(estimator)}; give --ho_blocks 1 or --zo none."
        )


def _groups(config: Config) -> Iterator[str]:
    if config.training.num_images_per_prompt == 1 and has_score_terms(config):
        yield (
            f"num_images_per_prompt: expected 2 or more with {config.estimator.estimator}, whose score terms compare "
            f"the images of a prompt with each other (leave-one-out), got 1; raise it or use --estimator full-bp."
        )


def _schedule(config: Config) -> Iterator[str]:
    warmup, length = config.optimizer.lr_warmup_steps, config.training.max_train_steps
    if warmup and config.optimizer.lr_scheduler == "constant":
        yield f"lr_warmup_steps: expected 0 with lr_scheduler constant, got {warmup}; use constant_with_warmup."
    if length is not None and warmup > length:
        yield f"lr_warmup_steps: expected at most max_train_steps ({length}), got {warmup}; lower --lr_warmup_steps."


def _rewards(config: Config) -> Iterator[str]:
    if config.reward.heldout_reward_fn == config.reward.reward_fn:
        yield (
            f"heldout_reward_fn: expected another reward than reward_fn, got {config.reward.reward_fn} for both; "
            f"a reward that is trained on cannot expose reward hacking."
        )


def _paths(config: Config) -> Iterator[str]:
    output = Path(config.training.output_dir)
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        got = "which cannot be written to" if existing.is_dir() else "which is a file"
        yield f"output_dir: expected a folder or a place for one, got {output} at {existing}, {got}; choose another."
    logging_dir = PurePath(config.logging.logging_dir)
    if logging_dir.is_absolute() or ".." in logging_dir.parts:
        yield f"logging_dir: expected a relative folder inside output_dir, got {logging_dir}; drop the leading part."
    for name, spec in (
        ("prompt_path", config.prompts.prompt_path),
        ("evaluation_prompt_path", config.validation.evaluation_prompt_path),
    ):
        if spec is not None and spec not in ("tiny-shapes/train", "tiny-shapes/test") and not Path(spec).is_file():
            yield (
                f"{name}: expected an existing text file, tiny-shapes/train or tiny-shapes/test, got {spec}; "
                f"check the path, seen from {Path.cwd()}."
            )
    vanished = config.checkpointing.resume_from_checkpoint
    if vanished is not None and len(PurePath(vanished).parts) > 1 and not Path(vanished).is_dir():
        yield f"resume_from_checkpoint: expected latest, a name or an existing folder, got {vanished}; check the path."
