"""A whole configuration: its groups of knobs, and the same as one flat mapping of names to plain values.

A field's name is its flag (`--rank 4`) and its YAML name (`rank: 4`); names are unique over all groups, so both stay
flat. Only the methods of estimation share names, as a run has one of them. A group's docstring is its title in
`--help`. Ranges are declared with the knobs; what cannot be together is found by the group's `check`, before a model, a
reward or torch is loaded.
"""

import difflib
import functools
import math
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_type_hints

from rlr_peft.config.chain import ChainArguments, ChainOfThoughtArguments
from rlr_peft.config.estimator import EstimatorArguments
from rlr_peft.config.knob import ConfigError, Group, Knob, fits, match, out_of_range, said, type_in_words
from rlr_peft.config.methods import DEFAULT_METHOD, METHOD_CHOICE, METHODS
from rlr_peft.config.model import LoraArguments, ModelArguments
from rlr_peft.config.prompts import PromptArguments
from rlr_peft.config.reward import RegularizationArguments, RewardArguments
from rlr_peft.config.training import (
    CheckpointingArguments,
    HubArguments,
    LoggingArguments,
    OptimizerArguments,
    TrainingArguments,
    ValidationArguments,
)
from rlr_peft.foreign_text import listed
from rlr_peft.redaction import HIDDEN, redacted_values

# No path or prompt holds them: control characters but the tab and the ends of lines, and halves of characters.
_UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# An empty prompt is one, too.
MAY_BE_EMPTY = ("negative_prompt", "validation_prompt")
GONE: dict[str, tuple[Any, str]] = {
    "normalize_rewards": (
        False,
        "write `reward_fn: {NAME: 1}`, a mapping with one reward, which divides it by its running standard deviation",
    ),
}
"""Knobs of earlier versions: the value that still means nothing in a saved file, and what to do about another."""


ELSEWHERE = {
    **dict.fromkeys(("lr", "adam_lr", "unet_lr"), "learning_rate"),
    **dict.fromkeys(("optim", "optimizer_type"), "optimizer"),
    **dict.fromkeys(("r", "lora_r", "lora_rank", "network_dim"), "rank"),
    **dict.fromkeys(("alpha", "network_alpha"), "lora_alpha"),
    **dict.fromkeys(("target_modules", "lora_target_modules"), "lora_layers"),
    **dict.fromkeys(("model", "model_id", "base_model", "model_name_or_path"), "pretrained_model_name_or_path"),
    **dict.fromkeys(("prompt", "prompts", "prompt_file", "prompt_fn"), "prompt_path"),
    **dict.fromkeys(("reward", "reward_function", "reward_model", "reward_funcs"), "reward_fn"),
    **dict.fromkeys(("batch_size", "sample_batch_size", "per_device_train_batch_size"), "train_batch_size"),
    **dict.fromkeys(("group_size", "num_generations", "num_image_per_prompt"), "num_images_per_prompt"),
    **dict.fromkeys(("steps", "num_steps", "sample_num_steps", "sampling_steps"), "num_inference_steps"),
    **dict.fromkeys(("max_steps", "num_train_steps", "iterations"), "max_train_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), "guidance_scale"),
    **dict.fromkeys(("method", "algorithm", "algo", "loss_type"), "estimator"),
    **dict.fromkeys(("beta", "kl_coef", "kl_weight"), "kl_beta"),
    **dict.fromkeys(("bf16", "fp16", "dtype", "precision"), "mixed_precision"),
    **dict.fromkeys(("ema",), "use_ema"),
    **dict.fromkeys(("dora",), "use_dora"),
    **dict.fromkeys(("save_steps", "save_every", "save_freq"), "checkpointing_steps"),
    **dict.fromkeys(("eval_steps", "eval_every"), "validation_steps"),
    **dict.fromkeys(("resume", "resume_from"), "resume_from_checkpoint"),
    **dict.fromkeys(("output", "save_dir", "logdir"), "output_dir"),
    **dict.fromkeys(("log_with", "tracker"), "report_to"),
    **dict.fromkeys(("token", "hf_token"), "hub_token"),
    **dict.fromkeys(("repo_id", "hub_repo_id"), "hub_model_id"),
}
"""Names of other trainers, and what they are called here."""
OTHER_ADAPTERS = (
    *("lokr", "use_lokr", "loha", "use_loha", "oft", "use_oft"),
    *("adapter_type", "lora_type", "peft_type", "network_module"),
)
"""Names of other trainers for what is not trained here."""


@dataclass(frozen=True)
class Config:
    """One run, fully resolved: hashable, immutable, checked by `load_config`.

    Attributes:
        estimator: of the class of the chosen method, with the knobs that it has.
    """

    model: ModelArguments
    lora: LoraArguments
    chain: ChainArguments
    prompts: PromptArguments
    chain_of_thought: ChainOfThoughtArguments
    reward: RewardArguments
    estimator: EstimatorArguments
    regularization: RegularizationArguments
    training: TrainingArguments
    optimizer: OptimizerArguments
    validation: ValidationArguments
    checkpointing: CheckpointingArguments
    hub: HubArguments
    logging: LoggingArguments

    def groups(self) -> dict[str, Group]:
        """Every group by its name."""
        return dict(vars(self))


@cache
def knobs() -> dict[str, Knob]:
    """Every knob by its flat name, in the order of the groups and fields.

    Raises:
        TypeError: two groups share a name, which flat flags cannot express.
    """
    found: dict[str, Knob] = {}
    for group, group_class in get_type_hints(Config).items():
        title = (group_class.__doc__ or group).strip()
        of_methods = group_class is EstimatorArguments
        for name, knob in (_method_knobs(title) if of_methods else knobs_of(group_class, group)).items():
            if name in found:
                raise TypeError(f"knob {name} is declared in {found[name].group} and in {group}")
            found[name] = knob
    return found


def knobs_of(group_class: type[Group], group: str = "own") -> dict[str, Knob]:
    """The knobs of one group by name."""
    types, title = get_type_hints(group_class), (group_class.__doc__ or group).strip()
    declared: tuple[Field[Any], ...] = fields(group_class) if is_dataclass(group_class) else ()
    return {one.name: Knob(one.name, group, title, types[one.name], one, {}) for one in declared}


def _method_knobs(title: str) -> dict[str, Knob]:
    """The choice of the method, then the knobs of all methods; null stands for the method's own default."""
    choice = Knob("estimator", "estimator", title, Literal[tuple(METHODS)], METHOD_CHOICE, {})
    found = {choice.name: choice}
    of_methods = {name: method.knobs() for name, method in METHODS.items()}
    for name in dict.fromkeys(name for declared in of_methods.values() for name in declared):
        having = {method: declared[name] for method, declared in of_methods.items() if name in declared}
        type_ = functools.reduce(operator.or_, [type_ for type_, _ in having.values()]) | None
        methods = {method: declared for method, (_, declared) in having.items()}
        first = next(iter(methods.values()))
        is_shared = all(methods.get(method) is first for method in METHODS)
        found[name] = Knob(name, "estimator", title, type_, first, methods, is_shared)
    return found


def check_names(names: Iterable[str], where: str, known: Collection[str] | None = None) -> None:
    """Raises ConfigError for the first name that is none of the known ones, with the nearest; None for all knobs."""
    for name in names:
        if name in (known or (*knobs(), *GONE)):
            continue
        nearest = difflib.get_close_matches(name.replace("-", "_"), known or knobs(), n=1, cutoff=0.5)
        if name.replace("-", "_") in OTHER_ADAPTERS:
            raise ConfigError(
                f"{where}: unknown name {name}; LoRA and DoRA (--use_dora) are trained here, as load_lora_weights of "
                "most diffusers pipelines loads no LoKr, LoHa or OFT."
            )
        if (ours := ELSEWHERE.get(name.replace("-", "_"))) in (known or knobs()):
            raise ConfigError(f"{where}: unknown name {name}; here it is {ours}.")
        hint = f"did you mean {nearest[0]}?" if nearest else "see --help-all for all names."
        raise ConfigError(f"{where}: unknown name {name}; {hint}")


def refuse_missing(known: Mapping[str, Knob], values: Mapping[str, Any], elsewhere: str = "") -> None:
    """Raises ConfigError for required knobs without a value; `elsewhere` says how else than by a flag one is given."""
    missing = [name for name, knob in known.items() if knob.required and values.get(name) is None]
    if missing:
        raise ConfigError(
            f"missing {', '.join(missing)}; give {'it' if len(missing) == 1 else 'each'} as a flag "
            f"(--{missing[0]} VALUE){elsewhere.format(name=missing[0])}."
        )


def refuse_gone(values: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a knob of an earlier version, but where it says what is so anyway."""
    for name, (harmless, advice) in GONE.items():
        if values.get(name) not in (None, harmless):
            raise ConfigError(f"{where}{name}: expected no such knob any more, got {said(values[name])}; {advice}.")


def config_to_dict(config: Config) -> dict[str, Any]:
    """All knobs as one flat mapping of plain values (tuples become lists, tables dicts), fit for JSON and YAML.

    It is written to files and shown, so null stands for a secret, and `***` for what is secret in an address. Null
    stands, too, for every knob that the method of estimation does not have.
    """
    flat: dict[str, Any] = {}
    for name, knob in knobs().items():
        has_it = not knob.methods or config.estimator.estimator in knob.methods
        value = getattr(getattr(config, knob.group), name) if has_it and not knob.secret else None
        flat[name] = redacted_values(value)
    return flat


def config_from_dict(values: Mapping[str, Any], flags: Collection[str] = ()) -> Config:
    """The inverse of `config_to_dict`, but for secrets; absent names take their defaults.

    Args:
        values: by flat name. What the method of estimation does not have may be null, what it is by default in all
            methods, or a number that tunes a part which others have.
        flags: names that are refused, whatever their value, where the method does not have them.

    Raises:
        ConfigError: an unknown or missing name, a wrong type, a number out of range, or a combination that cannot be
            run.
    """
    check_names(values, "config")
    refuse_gone(values, "")
    refuse_missing(
        knobs(),
        values,
        " or in the YAML file ({name}: VALUE); --config NAME takes a recipe, see `rlr-peft config --list`",
    )
    grouped: dict[str, dict[str, Any]] = {knob.group: {} for knob in knobs().values()}
    for name, value in values.items():
        if name in GONE:
            continue
        knob = knobs()[name]
        if not fits(knob.type, value):
            raise ConfigError(f"{name}: expected {type_in_words(knob.type)}, got {value!r:.200}; correct it.")
        grouped[knob.group][name] = match(knob.type, value)
    method = METHODS[grouped["estimator"].pop("estimator", DEFAULT_METHOD)]
    grouped["estimator"], problems = _of_method(method, grouped["estimator"], flags)
    _refuse(problems)
    classes = {**get_type_hints(Config), "estimator": method}
    config = Config(**{name: group_class(**grouped[name]) for name, group_class in classes.items()})
    check_config(config)
    return config


def _of_method(
    method: type[EstimatorArguments], values: Mapping[str, Any], flags: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """What of the values the method has, and a sentence for every other one that means something."""
    kept, problems = {}, []
    for name, value in values.items():
        declared = {other: METHODS[other].knobs()[name] for other in knobs()[name].methods}
        if value is None:
            continue
        if method.estimator in declared and fits(declared[method.estimator][0], value):
            kept[name] = value
            continue
        takers = [other for other, (type_, _) in declared.items() if fits(type_, value)]
        expected = "none"
        if method.estimator in declared:
            expected = type_in_words(declared[method.estimator][0])
        elif name not in flags and (
            knobs()[name].field.metadata["fine"] or all(value == field.default for _, field in declared.values())
        ):
            continue
        problems.append(
            f"{name}: expected {expected} with {method.estimator}, got {said(value)}; "
            f"use --estimator {listed(takers, 'or')}."
        )
    return kept, problems


def method_of(values: Mapping[str, Any]) -> type[EstimatorArguments]:
    """The class of the method that typed values choose."""
    return METHODS[values.get("estimator") or DEFAULT_METHOD]


def check_config(config: Config) -> None:
    """Raises one ConfigError that names every problem: the ranges first, and combinations once all ranges hold."""
    _refuse([problem for group in config.groups().values() for problem in _ranges(group)])
    _refuse([problem for group in config.groups().values() for problem in group.check(config)])


def check_group(group: Group) -> None:
    """Raises one ConfigError that names every value out of its range."""
    _refuse(list(_ranges(group)))


def _refuse(problems: list[str]) -> None:
    if len(problems) > 1:
        raise ConfigError(f"{len(problems)} problems in the configuration:", *(f"- {problem}" for problem in problems))
    if problems:
        raise ConfigError(problems[0])


def _ranges(group: Group) -> Iterator[str]:
    for declared in knobs_of(type(group)).values():
        name, value = declared.name, getattr(group, declared.name)
        texts = list(_texts(value))
        if name not in MAY_BE_EMPTY and not all(text.strip() for text in texts):
            yield f"{name}: expected a text, got an empty one; fill it or leave the flag out."
        if unfit := next((text for text in texts if _UNFIT.search(text)), None):
            yield f"{name}: expected a text without control characters, got {unfit!r:.80}; take them out."
            continue
        if any("//" in text and HIDDEN in text for text in texts):
            yield (
                f"{name}: expected a whole address, got {value} of a saved file, where {HIDDEN} stands for "
                f"what may be secret and is never written; give the whole address as --{name}."
            )
        if value == ():
            yield f"{name}: expected one or more values, got an empty list; fill it or leave it out."
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}: expected a finite number, got {value}; give a number."
        elif problem := out_of_range(name, value, declared.field):
            yield problem


def _texts(value: object) -> Iterator[str]:
    """The texts that a knob's value is or holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for text in pair if isinstance(text, str))
    elif isinstance(value, tuple):
        yield from (text for text in value if isinstance(text, str))
