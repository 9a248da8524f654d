"""Every knob of a run, group by group.

A field's name is its flag (`--rank 4`) and its YAML name (`rank: 4`); names are unique over all groups, so both stay
flat. A group's docstring is its title in `--help`. Ranges are declared with the knobs. `check_config` finds what can be
known to be impossible from the configuration alone, before a model, a reward or torch is loaded; each check yields one
sentence per problem: what was expected, what was got, what to do.
"""

import difflib
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path, PurePath
from typing import Any, get_args, get_type_hints

from rlr_peft.config.chain import (
    ChainArguments,
    ChainOfThoughtArguments,
    PromptArguments,
    check_chain_of_thought,
    check_prompts,
)
from rlr_peft.config.estimator import EstimatorArguments, RegularizationArguments, check_estimator, why_noiseless
from rlr_peft.config.knob import ConfigError, Table
from rlr_peft.config.model import LoraArguments, ModelArguments, check_memory
from rlr_peft.config.training import (
    CheckpointingArguments,
    HubArguments,
    LoggingArguments,
    OptimizerArguments,
    RewardArguments,
    TrainingArguments,
    ValidationArguments,
)
from rlr_peft.durable_files import stays_inside
from rlr_peft.redaction import HIDDEN, redacted_values

__all__ = [
    "ChainArguments",
    "ChainOfThoughtArguments",
    "CheckpointingArguments",
    "Config",
    "EstimatorArguments",
    "HubArguments",
    "LoggingArguments",
    "LoraArguments",
    "ModelArguments",
    "OptimizerArguments",
    "PromptArguments",
    "RegularizationArguments",
    "RewardArguments",
    "TrainingArguments",
    "ValidationArguments",
]


@dataclass(frozen=True)
class Config:
    """One run, fully resolved: hashable, immutable, checked by `load_config`."""

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


@dataclass(frozen=True)
class Knob:
    """One knob as the parser sees it: its flat name, its group's name and title, its type and its dataclass field."""

    name: str
    group: str
    group_title: str
    type: Any
    field: Field[Any]

    @property
    def required(self) -> bool:
        return self.field.default is MISSING

    @property
    def optional(self) -> bool:
        """Whether null is a value of it."""
        return type(None) in get_args(self.type)


@cache
def knobs() -> dict[str, Knob]:
    """Every knob by its flat name, in the order of the groups and fields.

    Raises:
        TypeError: two groups share a name, which flat flags cannot express.
    """
    found: dict[str, Knob] = {}
    for group_name, group_class in get_type_hints(Config).items():
        types = get_type_hints(group_class)
        for field in fields(group_class):
            if field.name in found:
                raise TypeError(f"knob {field.name} is declared in {found[field.name].group} and in {group_name}")
            title = (group_class.__doc__ or group_name).strip()
            found[field.name] = Knob(field.name, group_name, title, types[field.name], field)
    return found


def check_names(names: Iterator[str], where: str) -> None:
    """Raises ConfigError for the first name that is no knob, with the nearest known one."""
    for name in names:
        if name in knobs():
            continue
        nearest = difflib.get_close_matches(name.replace("-", "_"), knobs(), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "see --help for all names."
        raise ConfigError(f"{where}: unknown name {name}; {hint}")


def config_to_dict(config: Config) -> dict[str, Any]:
    """All knobs as one flat mapping of plain values (tuples become lists, tables dicts), fit for JSON and YAML.

    It is written to files and shown, so null stands for a secret, and `***` for what is secret in an address.
    """
    flat: dict[str, Any] = {}
    for name, knob in knobs().items():
        value = None if knob.field.metadata["secret"] else getattr(getattr(config, knob.group), name)
        flat[name] = redacted_values(value)
    return flat


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `config_to_dict`, but for secrets; absent names take their defaults, types are taken on trust.

    Raises:
        ConfigError: an unknown or missing name, a number out of range, or a combination that cannot be run.
    """
    check_names(iter(values), "config")
    missing = [name for name, knob in knobs().items() if knob.required and values.get(name) is None]
    if missing:
        raise ConfigError(
            f"missing {', '.join(missing)}; give {'it' if len(missing) == 1 else 'each'} as a flag "
            f"(--{missing[0]} VALUE) or in the YAML file ({missing[0]}: VALUE)."
        )
    grouped: dict[str, dict[str, Any]] = {knob.group: {} for knob in knobs().values()}
    for name, value in values.items():
        grouped[knobs()[name].group][name] = _frozen(value)
    groups = {name: group_class(**grouped[name]) for name, group_class in get_type_hints(Config).items()}
    config = Config(**groups)
    check_config(config)
    return config


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Table(value) if isinstance(value, dict) else value


# No path or prompt holds them: control characters but the tab and the ends of lines, and halves of characters.
_UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# An empty prompt is one, too.
MAY_BE_EMPTY = ("negative_prompt", "validation_prompt")
_COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def check_config(config: Config) -> None:
    """Raises one ConfigError that names every problem: the ranges first, and combinations once all ranges hold."""
    problems = list(_ranges(config))
    if not problems:
        checks = (
            *(_batches, _eta, check_estimator, check_memory, check_prompts, check_chain_of_thought),
            *(_regularization, _schedule, _rewards, _paths, _saving),
        )
        for check in checks:
            problems.extend(check(config))
    if len(problems) > 1:
        raise ConfigError(f"{len(problems)} problems in the configuration:", *(f"- {problem}" for problem in problems))
    if problems:
        raise ConfigError(problems[0])


def _ranges(config: Config) -> Iterator[str]:
    for group_field in fields(config):
        group = getattr(config, group_field.name)
        for field in fields(group):
            value = getattr(group, field.name)
            texts = list(_texts(value))
            if field.name not in MAY_BE_EMPTY and not all(text.strip() for text in texts):
                yield f"{field.name}: expected a text, got an empty one; fill it or leave the flag out."
            if unfit := next((text for text in texts if _UNFIT.search(text)), None):
                yield (f"{field.name}: expected a text without control characters, got {unfit!r:.80}; take them out.")
                continue
            if any("//" in text and HIDDEN in text for text in texts):
                yield (
                    f"{field.name}: expected a whole address, got {value} of a saved file, where {HIDDEN} stands for "
                    f"what may be secret and is never written; give the whole address as --{field.name}."
                )
            if value == ():
                yield f"{field.name}: expected one or more values, got an empty list; fill it or leave it out."
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{field.name}: expected a finite number, got {value}; give a number."
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            bounds = {word: bound for word, bound in field.metadata["bounds"].items() if bound is not None}
            if not all(_COMPARISONS[word](value, bound) for word, bound in bounds.items()):
                allowed = " and ".join(f"{word} {_plain(bound)}" for word, bound in bounds.items())
                yield f"{field.name}: expected {allowed}, got {value!s:.100}; change --{field.name}."


def _plain(bound: float) -> str:
    return f"{bound:.0f}" if bound == int(bound) else str(bound)


def _texts(value: object) -> Iterator[str]:
    """The texts that a knob's value is or holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for text in pair if isinstance(text, str))
    elif isinstance(value, tuple):
        yield from (text for text in value if isinstance(text, str))


def _batches(config: Config) -> Iterator[str]:
    training = config.training
    samples = training.train_batch_size * training.gradient_accumulation_steps
    if samples % training.num_images_per_prompt:
        yield (
            f"num_images_per_prompt: expected a divisor of the {samples} samples of an update (train_batch_size "
            f"{training.train_batch_size} x gradient_accumulation_steps {training.gradient_accumulation_steps}), got "
            f"{training.num_images_per_prompt}; change one of the three so that every prompt's group is whole."
        )


def _eta(config: Config) -> Iterator[str]:
    chain = config.chain
    if chain.step_kind in ("ancestral", "cps"):
        for name, eta in (("eta", chain.eta), ("evaluation_eta", config.validation.evaluation_eta)):
            if eta > 1:
                yield f"{name}: expected 0 to 1 with step_kind {chain.step_kind}, got {eta}; lower --{name}."


def _regularization(config: Config) -> Iterator[str]:
    regularization = config.regularization
    wanted = [
        name for name in ("kl_beta", "kl_interval", "kl_limit") if getattr(regularization, name) not in (None, 0.0)
    ]
    noiseless = why_noiseless(config.chain)
    if wanted and noiseless:
        yield (
            f"{wanted[0]}: expected noise in the chain, without which the divergence is not defined, got {noiseless}; "
            f"raise --eta with a stochastic --step_kind, or drop --{wanted[0]}."
        )
    if regularization.early_stopping_steps is not None and config.reward.heldout_reward_fn is None:
        yield (
            f"early_stopping_steps: expected a heldout_reward_fn to watch, got none with "
            f"{regularization.early_stopping_steps}; give --heldout_reward_fn."
        )


def _schedule(config: Config) -> Iterator[str]:
    warmup, length = config.optimizer.lr_warmup_steps, config.training.max_train_steps
    if warmup and config.optimizer.lr_scheduler == "constant":
        yield f"lr_warmup_steps: expected 0 with lr_scheduler constant, got {warmup}; use constant_with_warmup."
    if length is not None and warmup > length:
        yield f"lr_warmup_steps: expected at most max_train_steps ({length}), got {warmup}; lower --lr_warmup_steps."


def _rewards(config: Config) -> Iterator[str]:
    reward = config.reward
    trained = reward.reward_fn if isinstance(reward.reward_fn, dict) else {reward.reward_fn: 1.0}
    for name in reward.heldout_reward_fn or ():
        if name in trained:
            yield (
                f"heldout_reward_fn: expected another reward than reward_fn, got {name} for both; "
                f"a reward that is trained on cannot expose reward hacking."
            )
    heldout = reward.heldout_reward_fn or ()
    if len(set(heldout)) < len(heldout):
        yield f"heldout_reward_fn: expected different rewards, got {' '.join(heldout)}; drop what is there twice."
    if not trained or not any(trained.values() or [0]) or not all(math.isfinite(w) for w in trained.values()):
        yield (
            f"reward_fn: expected finite weights, not all 0, got {dict(trained)}; write `{{NAME: WEIGHT, ...}}`, for "
            "example `{pickscore: 1, aesthetic: 0.5}`."
        )
    if isinstance(reward.reward_fn, str) and reward.reward_fn.lstrip().startswith("{"):
        yield f"reward_fn: expected a mapping of names to numbers, got {reward.reward_fn}; check its weights."
    for name, minimum in (reward.reward_minimum or {}).items():
        if name not in trained:
            yield f"reward_minimum: expected a name of reward_fn ({', '.join(trained)}), got {name}; correct it."
        if not math.isfinite(minimum):
            yield f"reward_minimum: expected a finite number for {name}, got {minimum}; correct it."


def _hub(config: Config) -> Iterator[str]:
    hub, interval = config.hub, config.checkpointing.checkpointing_steps
    if hub.push_every is not None and not hub.push_to_hub:
        yield f"push_every: expected push_to_hub with it, got {hub.push_every} alone; give --push_to_hub too."
    if hub.push_every is not None and hub.push_every % interval:
        yield (
            f"push_every: expected a multiple of checkpointing_steps ({interval}), as checkpoints are what is "
            f"published, got {hub.push_every}; change one of the two."
        )


def check_revision(name: str, revision: str) -> Iterator[str]:
    """Yields what is wrong with the name of a branch, tag or commit, which becomes a path in the Hub's cache."""
    if not stays_inside(revision):
        yield f"{name}: expected a branch, tag or commit of the repository, got {revision!r}; correct it."


def _saving(config: Config) -> Iterator[str]:
    yield from _hub(config)
    if config.lora.output_kohya_format and config.lora.use_dora:
        yield "output_kohya_format: expected plain LoRA, got use_dora, which cannot be converted; drop one of the two."


def _paths(config: Config) -> Iterator[str]:
    output = Path(config.training.output_dir)
    # os.path where Path would raise: a name that is too long, a folder that may not be looked into
    existing = next(path for path in (output, *output.absolute().parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        got = "which cannot be written to" if existing.is_dir() else "which is a file"
        yield f"output_dir: expected a folder or a place for one, got {output} at {existing}, {got}; choose another."
    for name in ("logging_dir", "tracker_name"):
        inside = getattr(config.logging, name)
        if not stays_inside(inside):
            yield f"{name}: expected a relative folder inside output_dir, got {inside}; drop the leading part."
    for name, revision in (("revision", config.model.revision), ("hub_revision", config.hub.hub_revision)):
        if revision is not None:
            yield from check_revision(name, revision)
    if config.model.variant is not None and not re.fullmatch(r"[\w.-]+", config.model.variant):
        yield f"variant: expected a word of a file name such as fp16, got {config.model.variant!r}; correct it."
    vanished = config.checkpointing.resume_from_checkpoint
    places = [] if vanished is None else [Path(vanished), output / vanished]
    if vanished is not None and len(PurePath(vanished).parts) > 1 and not any(map(os.path.isdir, places)):
        yield f"resume_from_checkpoint: expected latest, a name or an existing folder, got {vanished}; check the path."
