"""Config as groups of dataclasses, and as one flat mapping of names to plain values."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from rlr_peft.config.arguments import Config
from rlr_peft.config.checks import check_config
from rlr_peft.config.knob import ConfigError, Table
from rlr_peft.redaction import redacted_values


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
