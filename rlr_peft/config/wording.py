"""Knobs and parser errors in a person's words."""

import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from rlr_peft.config.flat import Knob, knobs
from rlr_peft.config.knob import ConfigError
from rlr_peft.plain_files import AMBIGUOUS, MAX_DIGITS, YAML_VALUES, Ambiguous
from rlr_peft.redaction import HIDDEN

_NUMBER = re.compile("|".join(pattern for tag, pattern, _ in YAML_VALUES if tag in ("int", "float")))


def element_type(knob: Knob) -> type | None:
    """The type of a list knob's elements; None for a knob that is not a list."""
    for option in get_args(knob.type):
        if get_origin(option) is tuple:
            element: type = get_args(option)[0]
            return element
    return None


def takes_text(knob: Knob, value: Any) -> bool:
    """Whether the value is a text and the knob takes any text."""
    return isinstance(value, str) and str in _options(knob)


def takes_mapping(knob: Knob) -> bool:
    """Whether a mapping is a value of the knob."""
    return any(get_origin(option) is dict for option in _options(knob))


def clear_value(knob: Knob, value: Any, where: str) -> Any:
    """The value, in which no text stands for one number or truth value here and for another elsewhere (0x10, 010, yes).

    Args:
        knob: whose value it is.
        value: as typed, or as `parse_yaml` gives it.
        where: the file, for the message.

    Raises:
        ConfigError: the value or a part of it is such a text.
    """
    if isinstance(value, dict):
        return {name: _clear_part(knob, part, where) for name, part in value.items()}
    if isinstance(value, list):
        return [_clear_part(knob, part, where) for part in value]
    return _clear_part(knob, value, where)


def _clear_part(knob: Knob, part: Any, where: str) -> Any:
    if not isinstance(part, str) or part in _choices(knob):
        return str(part) if isinstance(part, str) else part
    unclear = AMBIGUOUS.fullmatch(part) is not None
    if _takes_number(knob) and len(part) > MAX_DIGITS and _NUMBER.fullmatch(part):
        advice = f"write a number of at most {MAX_DIGITS} digits"
    elif _takes_number(knob) and (unclear or (_is_a_number_to_python(part) and not _NUMBER.fullmatch(part))):
        advice = "write it in plain decimal digits"
    elif knob.type is bool and unclear:
        advice = "write true or false"
    elif isinstance(part, Ambiguous):
        advice = "put quotes around it, as other readers of YAML take it for no text"
    else:
        return part
    place = f"{part.place}: " if isinstance(part, Ambiguous) else ""
    raise ConfigError(f"{where}{place}{knob.name}: expected {type_in_words(knob)}, got {shortened(part)}; {advice}.")


def _choices(knob: Knob) -> set[str]:
    options = (*_options(knob), *get_args(element_type(knob)))
    return {str(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)}


def _takes_number(knob: Knob) -> bool:
    element = element_type(knob)
    options = {*_options(knob), element, *get_args(element)}
    options |= {type_ for option in options if get_origin(option) is dict for type_ in get_args(option)}
    # In a list of numbers and names, a name does not look like a number.
    return bool(options & {int, float})


def _is_a_number_to_python(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def shortened(text: str) -> str:
    """As much of a value as a message can show."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def placeholder(knob: Knob) -> str:
    """What `--help` shows as the value: the choices, or N (whole number), X (number), TEXT."""
    choices = [str(choice) for option in _options(knob) if get_origin(option) is Literal for choice in get_args(option)]
    if any(get_origin(option) is dict for option in _options(knob)):
        choices.append("{NAME: VALUE, ...}")
    for type_, word in ((int, "N"), (float, "X"), (str, "TEXT")):
        element = element_type(knob)
        if type_ in _options(knob) or element is type_ or type_ in get_args(element):
            choices.insert(0, word)
    return choices[0] if len(choices) == 1 else "{" + ",".join(choices) + "}"


def help_text(knob: Knob) -> str:
    """The knob's sentence, unit and default, as `--help` shows them."""
    unit = f" [{knob.field.metadata['unit']}]" if knob.field.metadata["unit"] else ""
    if knob.required:
        end = "(required)"
    else:
        default = knob.field.default
        end = f"(default: {'null' if default is None else str(default).lower() if knob.type is bool else default})"
    return f"{knob.field.metadata['sentence']}{unit} {end}".replace("%", "%%")


def type_in_words(knob: Knob) -> str:
    """The type of a knob: `a whole number or auto or null`."""
    element = element_type(knob)
    if element is not None:
        return {int: "whole numbers", float: "numbers", str: "one or more texts"}.get(
            element, "steps or names"
        ) + " or null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    words: list[str] = []
    for option in _options(knob):
        if get_origin(option) is dict:
            words.append(f"a mapping of names to {'numbers' if get_args(option)[1] is float else 'texts'}")
            continue
        words.extend(map(str, get_args(option)) if get_origin(option) is Literal else [names[option]])
    return " or ".join(words)


def explain(message: str, given: Mapping[str, Any]) -> str:
    """One plain line for an error message of jsonargparse; one of unknown form is passed on, joined to one line.

    Args:
        message: the text of the error.
        given: the values of the YAML file, empty for an error in the flags.
    """
    joined = " ".join(message.split())
    stray = re.fullmatch(r"[Uu]nrecognized arguments: (.*)", joined)
    if stray:
        return f"expected --name VALUE, got the stray {stray[1]}; put quotes around a value that holds spaces."
    named = re.search(r'(?:key "|argument --)(\w+)', joined)
    if named is None or named[1] not in knobs():
        return shortened(joined)
    name = named[1]
    expected = type_in_words(knobs()[name])
    if re.search(r"expected (one|at least one) argument", joined):
        return f"{name}: expected {expected}, got nothing; write --{name} VALUE (--{name}=VALUE if it starts with -)."
    value = re.search(r"(?:Got|Given) value: (.*)$", joined)
    got = shortened(repr(given[name]) if name in given else value[1] if value else joined)
    if knobs()[name].field.metadata["secret"]:
        got = HIDDEN
    got = {"None": "null", "True": "true", "False": "false"}.get(got, got)
    advice = f"write {name}: VALUE" if name in given else f"write --{name} VALUE"
    if name in given and "text" in expected and not isinstance(given[name], (dict, list)):
        advice = "put quotes around it"
    return f"{name}: expected {expected}, got {got}; {advice}."


def _options(knob: Knob) -> tuple[Any, ...]:
    is_union = get_origin(knob.type) not in (None, Literal, tuple)
    return get_args(knob.type) if is_union else (knob.type,)
