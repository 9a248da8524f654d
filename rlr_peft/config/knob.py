"""One knob: a dataclass field with its own sentence, unit and range, and how what people write becomes its value.

Types are those of the fields: bool, int, float, str, fixed words (`Literal`), lists (`tuple[X, ...]`), mappings
(`dict[str, X]`), and unions of them with None. Reading is strict: a text that is a number here and something else to
another reader of YAML (0x10, 010, yes) is refused.
"""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from rlr_peft.errors import UserError
from rlr_peft.files import AMBIGUOUS, MAX_DIGITS, YAML_VALUES, Ambiguous
from rlr_peft.foreign_text import listed
from rlr_peft.redaction import HIDDEN

if TYPE_CHECKING:
    from rlr_peft.config.arguments import Config

Found = Literal["words", "model", "prompts", "dataset", "reward"]

_WITH_A_UNIT = re.compile(r"([-+]?[0-9]+(?:\.[0-9]+)?) ?[a-zA-Z%]+")
_NUMBER = re.compile("|".join(pattern for tag, pattern, _ in YAML_VALUES if tag in ("int", "float")))
_PLAIN = [(tag, re.compile(pattern)) for tag, pattern, _ in YAML_VALUES]
_NO_MATCH = object()


class ConfigError(UserError, ValueError):
    """The configuration cannot be run; the message says what was expected, what was got and what to do."""


class Table(dict[str, Any]):
    """A mapping inside a frozen config: it has a hash, and nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class Group:
    """Base of the dataclasses of knobs; the docstring of each is its title in `--help`."""

    def check(self, config: "Config") -> Iterator[str]:
        """Yields a sentence for every combination that cannot be run: what was expected, what was got, what to do."""
        yield from ()


def knob(
    default: Any,
    sentence: str,
    *,
    unit: str | None = None,
    within: str = "(-inf, inf)",
    secret: bool = False,
    found: Found | None = None,
    fine: bool = False,
) -> Any:
    """Declare one knob of a frozen arguments dataclass.

    Args:
        default: the default value; `MISSING` makes the knob required.
        sentence: one plain sentence, shown by `--help`.
        unit: what one of it is, shown by `--help` in brackets.
        within: the allowed interval of a number, such as `[0, 1)`.
        found: what of its texts is taken from a config that was merely found, see `config/files.py`; None for nothing.
            Numbers, true and false, and choices of fixed words always are.
        secret: never shown or written: null stands for it in `repr`, YAML, trackers and cards.
        fine: tunes a part of some methods, but does not say whether there is one. A file that serves several methods
            may hold it beside a method without that part; a flag may not.
    """
    metadata: Mapping[str, Any] = {
        "sentence": sentence,
        "unit": unit,
        "secret": secret,
        "found": found,
        "fine": fine,
        "within": within,
    }
    if default is MISSING:
        return field(metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


def preset(base: type, name: str, default: Any) -> Any:
    """The knob of a base class with another default."""
    declared = {declared.name: declared for declared in fields(base)}[name]
    return field(default=default, metadata=declared.metadata, repr=declared.repr)


@dataclass(frozen=True)
class Knob:
    """One knob as flags, files and `--help` know it.

    Attributes:
        name: of the flag and in YAML.
        group: the attribute of Config that holds it.
        group_title: of its part of `--help`.
        type: of its values; of a knob that methods share, of any of them.
        field: where it is declared, at first.
        methods: the field of every method of estimation that has it; empty for a knob of every run.
        shared: whether all methods have it, and mean the same by it.
    """

    name: str
    group: str
    group_title: str
    type: Any
    field: Field[Any]
    methods: Mapping[str, Field[Any]]
    shared: bool = False

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.field.default is MISSING

    @property
    def default(self) -> Any:
        """None for a required knob, and for one whose default is the method's own."""
        return None if self.required or self.methods else self.field.default

    @property
    def secret(self) -> bool:
        """Whether it is never shown."""
        return bool(self.field.metadata["secret"])

    @cached_property
    def options(self) -> tuple[Any, ...]:
        """The members of its type."""
        return _options(self.type)

    @property
    def optional(self) -> bool:
        """Whether null is a value of it."""
        return NoneType in self.options

    @property
    def takes_text(self) -> bool:
        """Whether any text is a value of it."""
        return str in self.options

    @property
    def takes_mapping(self) -> bool:
        """Whether a mapping is a value of it."""
        return any(get_origin(option) is dict for option in self.options)

    @cached_property
    def element_type(self) -> Any:
        """The type of a list's elements; None for a knob that is not a list."""
        return next((get_args(option)[0] for option in self.options if get_origin(option) is tuple), None)

    @property
    def placeholder(self) -> str:
        """What `--help` shows as the value: the choices, NAME for many, or N (whole number), X (number), TEXT."""
        words = {int: "N", float: "X", str: "TEXT"}
        shown = [word for type_, word in words.items() if type_ in (*self.options, *_options(self.element_type))]
        shown += ["NAME"] if self._is_long_choice else _choices(self.options)
        if self.takes_mapping:
            shown.append("{NAME: VALUE, ...}")
        return shown[0] if len(shown) == 1 else "{" + ",".join(shown) + "}"

    @property
    def _is_long_choice(self) -> bool:
        return len(_choices(self.options)) > 6

    @property
    def help(self) -> str:
        """Sentence, unit and default, as `--help` shows them; a line for each way in which methods mean it."""
        if not self.methods or self.shared:
            words = [_sentence(self.field)]
            if self._is_long_choice:
                words.append(f"One of {listed(_choices(self.options), 'or')}.")
            if self.required:
                words.append("(required)")
            elif self.field.default is not None:
                words.append(f"(default: {said(self.field.default)})")
            return " ".join(words).replace("%", "%%")
        meanings: dict[str, dict[str, list[str]]] = {}
        for method, declared in self.methods.items():
            defaults = meanings.setdefault(_sentence(declared), {})
            defaults.setdefault(said(declared.default), []).append(method)
        return "\n".join(
            f"{sentence} (default: {'; '.join(f'{value} with {listed(names)}' for value, names in defaults.items())})"
            for sentence, defaults in meanings.items()
        ).replace("%", "%%")

    def read(self, given: Any, where: str = "") -> Any:
        """The typed value of what was written.

        Args:
            given: what `parse_yaml` makes of a file; the words of a flag, a list of them for a list.
            where: `--config FILE: `; empty for a flag.

        Raises:
            ConfigError: it is no value of the knob, or one that other readers would take for another.
        """
        if self.element_type is not None and given == ["null"] and not where:
            given = None  # `--ho_window null` takes back what a file says
        if self.element_type is not None and isinstance(given, str | int | float):
            given = [given]
        value = match(self.type, self._plain(given, where))
        if value is _NO_MATCH:
            raise ConfigError(where + self._refusal(given, in_file=bool(where)))
        return value

    def _plain(self, given: Any, where: str) -> Any:
        """The same, with numbers, truth values and null in place of texts that stand for them."""
        if isinstance(given, dict):
            types = [get_args(option)[1] for option in self.options if get_origin(option) is dict]
            return {name: self._plain_part(types, part, where) for name, part in given.items()}
        if isinstance(given, list):
            return [self._plain_part(_options(self.element_type), part, where) for part in given]
        return self._plain_part(self.options, given, where)

    def _plain_part(self, options: Iterable[Any], part: Any, where: str) -> Any:
        if not isinstance(part, str) or part in _choices(options):
            return str(part) if isinstance(part, str) else part
        takes_number = not {int, float}.isdisjoint(options)
        unclear = AMBIGUOUS.fullmatch(part) is not None
        advice = None
        if takes_number and len(part) > MAX_DIGITS and _NUMBER.fullmatch(part):
            advice = f"write a number of at most {MAX_DIGITS} digits"
        elif takes_number and (unclear or (_is_a_number_to_python(part) and not _NUMBER.fullmatch(part))):
            advice = "write it in plain decimal digits"
        elif bool in options and unclear:
            advice = "write true or false"
        elif isinstance(part, Ambiguous):
            advice = "put quotes around it, as other readers of YAML take it for no text"
        if advice is not None:
            place = f"{part.place}: " if isinstance(part, Ambiguous) else ""
            raise ConfigError(
                f"{where}{place}{self.name}: expected {self.type_in_words()}, got {shortened(part)}; {advice}."
            )
        if str not in options:
            return _scalar(part)
        if takes_number and isinstance(_scalar(part), int):  # a step, in a list of steps and names
            return _scalar(part)
        return None if part == "null" and not where and NoneType in options else str(part)

    def _refusal(self, given: Any, in_file: bool) -> str:
        got, advice = shortened(repr(given) if in_file else str(given)), f"write --{self.name} VALUE"
        if in_file:
            got = {"None": "null", "True": "true", "False": "false"}.get(got, got)
            is_text = "text" in self.type_in_words() and not isinstance(given, (dict, list))
            advice = "put quotes around it" if is_text else f"write {self.name}: VALUE"
        elif isinstance(given, list):  # of a flag's words the first that is wrong
            is_right = [match(self.element_type, self._plain([part], "")[0]) is not _NO_MATCH for part in given]
            got = shortened(str(given[is_right.index(False)]))
        if given is None:
            advice = "give a value"
        elif not {int, float}.isdisjoint(self.options) and (found := _WITH_A_UNIT.fullmatch(str(given))):
            unit = self.field.metadata["unit"]
            advice = f"write the number alone: {found[1]}{f' [{unit}]' if unit else ''}"
        words = {word.casefold(): word for word in _choices(_options(self.element_type or self.type))}
        near = get_close_matches(got.casefold(), words, n=1)
        hint = f" Did you mean {words[near[0]]}?" if near else ""
        return f"{self.name}: expected {self.type_in_words()}, got {HIDDEN if self.secret else got}; {advice}.{hint}"

    def type_in_words(self) -> str:
        """`a whole number or auto or null`."""
        return type_in_words(self.type)


def match(type_: Any, value: Any) -> Any:
    """The value as one of the type, lists as tuples and mappings as tables; `_NO_MATCH` if it is none.

    A whole number is a number, too; a truth value is none.
    """
    for option in _options(type_):
        if get_origin(option) is tuple and isinstance(value, (list, tuple)):
            parts = [match(get_args(option)[0], part) for part in value]
            if _NO_MATCH not in parts:
                return tuple(parts)
        elif get_origin(option) is dict and isinstance(value, dict):
            table = Table({name: match(get_args(option)[1], part) for name, part in value.items()})
            if _NO_MATCH not in table.values() and all(isinstance(name, str) for name in table):
                return table
        elif get_origin(option) is Literal:
            if isinstance(value, str) and value in get_args(option):
                return value
        elif option is float and type(value) in (int, float):
            return float(value)
        elif option is type(value):
            return value
    return _NO_MATCH


def fits(type_: Any, value: Any) -> bool:
    """Whether the value is one of the type."""
    return match(type_, value) is not _NO_MATCH


def type_in_words(type_: Any) -> str:
    """A type as messages call it: `a whole number or auto or null`."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
    lists = {int: "whole numbers", float: "numbers", str: "one or more texts"}
    words: list[str] = []
    for option in _options(type_):
        if get_origin(option) is tuple:
            words.append(lists.get(get_args(option)[0], "steps or names"))
        elif get_origin(option) is dict:
            words.append(f"a mapping of names to {'numbers' if get_args(option)[1] is float else 'texts'}")
        elif get_origin(option) is Literal:
            words += get_args(option)
        else:
            words.append(names[option])
    return " or ".join(sorted(dict.fromkeys(words), key="null".__eq__))


def bounds_of(declared: Field[Any]) -> dict[str, float]:
    """The ends of a knob's range in words: `{"at least": 0, "below": 1}`."""
    within = declared.metadata["within"]
    low, high = (int(end) if end.isdigit() else float(end) for end in within[1:-1].split(", "))
    ends = {"at least" if within[0] == "[" else "above": low, "at most" if within[-1] == "]" else "below": high}
    return {word: end for word, end in ends.items() if math.isfinite(end)}


def out_of_range(name: str, value: object, declared: Field[Any]) -> str | None:
    """The sentence about a number outside of its knob's range; None where it is inside, and of what is no number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    holds = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
    bounds = bounds_of(declared)
    if all(holds[word](value, bound) for word, bound in bounds.items()):
        return None
    allowed = " and ".join(
        f"{word} {bound:.0f}" if bound == int(bound) else f"{word} {bound}" for word, bound in bounds.items()
    )
    return f"{name}: expected {allowed}, got {value!s:.100}; change --{name}."


def said(value: Any) -> str:
    """A value as people write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shortened(" ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def shortened(text: str) -> str:
    """As much of a value as a message can show."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _options(type_: Any) -> tuple[Any, ...]:
    is_union = get_origin(type_) not in (None, Literal, tuple, dict)
    return get_args(type_) if is_union else (type_,)


def _choices(options: Iterable[Any]) -> list[str]:
    """The fixed words among the members of a type."""
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    return list(dict.fromkeys(words))


def _sentence(declared: Field[Any]) -> str:
    unit = f" [{declared.metadata['unit']}]" if declared.metadata["unit"] else ""
    return f"{declared.metadata['sentence']}{unit}"


def _scalar(text: str) -> Any:
    """What a plain text is in YAML 1.2."""
    tag = next((tag for tag, pattern in _PLAIN if pattern.fullmatch(text)), None)
    match tag:
        case "bool":
            return text.lower() == "true"
        case "int" if len(text) <= MAX_DIGITS:  # a longer one stays a text, which no knob takes for a number
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case "null":
            return None
        case _:
            return str(text)


def _is_a_number_to_python(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
