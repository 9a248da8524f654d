"""Strict reading of the small YAML and JSON files that people write: what is unclear is refused with its place.

Nothing a file says can run code, repeat itself into gigabytes or nest without end, and no plain value means one thing
here and another to a YAML 1.1 reader.
"""

import json
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**18  # read in three seconds at worst
MAX_DEPTH = 20
MAX_DIGITS = 300  # the largest float has 309
YAML_VALUES = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)\.[0-9]*|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
)
# Numbers and truth values to some readers and texts to others: 0x10, 0o10, 010, 1_000, 1:30, yes.
AMBIGUOUS = re.compile(
    r"[-+]?0[xXbBoO][0-9a-fA-F_]+|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"
    r"|[-+]?(?:0[0-9_]|[0-9]+_)[0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|(?i:yes|no|on|off)"
)
AMBIGUOUS_TAG = "!ambiguous"
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels; write it flat"


class PlainFileError(ValueError):
    """The file cannot be read as it stands; the message says where and why, without the file's name."""


class Ambiguous(str):
    """A text without quotes that other readers take for a number or a truth value.

    Attributes:
        place: `line 3`.
    """

    place: str


def read_plain_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a small UTF-8 file, without a byte order mark.

    Raises:
        PlainFileError: no regular file, unreadable, too large, another encoding, or a NUL inside.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
    except OSError as error:
        raise PlainFileError(f"cannot be read ({error.strerror})") from None
    except ValueError as error:  # NULs and half characters
        raise PlainFileError(f"cannot be read (the path: {error})") from None
    if not stat.S_ISREG(status.st_mode):
        got = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise PlainFileError(f"expected a file, got {got}")
    if len(content) > max_bytes:
        raise PlainFileError(f"expected at most {max_bytes >> 10} KiB, got a file of {status.st_size >> 10} KiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PlainFileError(
            f"line {line}: expected UTF-8 text, got the byte 0x{content[error.start]:02x}; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise PlainFileError(f"line {line}: expected UTF-8 text, got a NUL; save the file as UTF-8")
    return text


def parse_yaml(text: str) -> Any:
    """The value of one YAML document: mappings of texts to values, lists, texts, numbers, truth values and null.

    Plain values are those of YAML 1.2: `no` is a text and `1e-4` a number. A plain text that YAML 1.1 reads as
    something else comes as `Ambiguous`, for the caller to refuse where no such text is expected.

    Raises:
        PlainFileError: no YAML, a name given twice at any depth, a tag, an anchor or alias, a name that is no text, a
            number of more than 300 digits, or nested deeper than 20 levels.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        # A quote or bracket without its end: where it began says more than where the file ended.
        began = f" (in what began in line {error.context_mark.line + 1})" if error.context_mark else ""
        raise PlainFileError(f"{_place(mark)}not valid YAML: {problem}{began}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise PlainFileError(f"line {line}: not valid YAML: the character U+{error.character:04X} is in it") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        PlainFileError: no JSON, a name given twice at any depth, NaN or Infinity, a number of more than 300 digits, or
            nested deeper than 20 levels.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_json_int, parse_float=_json_float
        )
    except json.JSONDecodeError as error:
        raise PlainFileError(f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise PlainFileError(_TOO_DEEP) from None
    if is_nested_too_deep(value):
        raise PlainFileError(_TOO_DEEP)
    return value


def is_nested_too_deep(value: Any) -> bool:
    """Whether lists and mappings lie inside each other in more than 20 levels.

    So deep a value cannot be copied or written again by the usual, recursive ways.
    """
    level = [value] if isinstance(value, (dict, list, tuple)) else []
    for _ in range(MAX_DEPTH):
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
        level = [part for part in level if isinstance(part, (dict, list, tuple))]
    return bool(level)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (add_implicit_resolver fills it)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        place = _place(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise PlainFileError(f"{place}anchors (&) and aliases (*) are not read; write the value out, or quote it")
        if event.tag is not None:
            raise PlainFileError(f"{place}tags (!) are not read; write the plain value, or quote it")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise PlainFileError(f"{place}{_TOO_DEEP}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            place = _place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                raise PlainFileError(f"{place}expected a name before the colon, got {_kind(key)}")
            if key.value in lines:
                raise PlainFileError(
                    f"{place}{_short(key.value)} is given twice, the first time in line {lines[key.value]}; keep one"
                )
            lines[key.value] = key.start_mark.line + 1
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = node.value
    if len(text) > MAX_DIGITS:
        raise PlainFileError(
            f"{_place(node.start_mark)}expected a number of at most {MAX_DIGITS} digits, got {len(text)}"
        )
    if node.tag.endswith("int"):
        return int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _construct_ambiguous(loader: _Loader, node: yaml.ScalarNode) -> Ambiguous:
    text = Ambiguous(node.value)
    text.place = f"line {node.start_mark.line + 1}"
    return text


for _tag, _pattern, _first in YAML_VALUES:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver(AMBIGUOUS_TAG, re.compile(rf"(?:{AMBIGUOUS.pattern})$"), list("-+0123456789yYnNoO"))
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_number)
_Loader.add_constructor(AMBIGUOUS_TAG, _construct_ambiguous)


def _place(mark: Any) -> str:
    return "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise PlainFileError(f'"{_short(name)}" is given twice in one object; keep one')
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise PlainFileError(f"expected finite numbers, got {name}")


def _json_int(text: str) -> int:
    _check_digits(text)
    return int(text)


def _json_float(text: str) -> float:
    _check_digits(text)
    return float(text)


def _check_digits(text: str) -> None:
    if len(text) > MAX_DIGITS:
        raise PlainFileError(f"expected a number of at most {MAX_DIGITS} digits, got {len(text)}")
