"""Files that people write, read strictly; those that ship in `configs/`; and our own, which are whole or not there.

Of small YAML and JSON files what is unclear is refused with its place. Nothing a file says can run code, repeat itself
into gigabytes or nest without end, and no plain value means one thing here and another to a YAML 1.1 reader.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path, PureWindowsPath
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


_SHIPPED = Path(__file__).parent / "configs"


def recipes() -> dict[str, Path]:
    """Training configs by name: `--config sdxl`."""
    return _shipped("*.yaml")


def prompt_sets() -> dict[str, Path]:
    """Files of prompts by name: `--prompt_path scenes`."""
    return _shipped("prompts/*.txt")


def quantizations() -> dict[str, Path]:
    """Arguments of BitsAndBytesConfig by name: `--bnb_quantization_config_path nf4`."""
    return _shipped("quantization/*.json")


def first_sentence(recipe: Path) -> str:
    """What a recipe says of itself in the first sentence of the comment that it begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def _shipped(pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(_SHIPPED.glob(pattern))}


WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""The adapter's file: the one name that `pipeline.load_lora_weights(folder_or_repo)` finds by itself."""

KOHYA_NAME = "kohya/lora_kohya.safetensors"
"""A copy for other programs, in a subfolder: `load_lora_weights` would take a second file beside the adapter for it."""

SECOND_EXPERT = "transformer_2"
"""The attribute of a second denoiser, and the subfolder of its adapter."""

ADAPTER_FILES = (WEIGHT_NAME, f"{SECOND_EXPERT}/{WEIGHT_NAME}")
"""Those of the first denoiser and of the second, from the folder of a run on."""


def stays_inside(name: str) -> bool:
    r"""Whether a name from a file or a flag, joined to a folder, is a path inside it on any system.

    An absolute path, `..` and a NUL are not; `/` and `\\` both part folders.
    """
    path = PureWindowsPath(name)
    return not (path.anchor or name.startswith("/") or ".." in path.parts or "\0" in name) and bool(path.parts)


def why_no_place(path: Path, is_file: bool = False) -> str | None:
    """Why there can be no folder, or file, to write to at this place: "/a/b is a file"; None if there can be one.

    Nothing is made. Not seen are quotas, full disks, and file systems that say yes and mean no.
    """
    # os.path where Path would raise: a folder that may not be looked into
    if is_file and os.path.isdir(path):
        return f"{path} is a folder"
    folder = path.parent if is_file else path
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not os.path.exists(existing):
        return f"{existing} is a link to nothing"
    if not existing.is_dir():
        return f"{existing} is a file"
    if not os.access(existing, os.W_OK | os.X_OK) or existing.resolve().is_relative_to("/proc"):
        return f"{existing} cannot be written to"
    longest = os.pathconf(existing, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if any(len(os.fsencode(name)) > longest for name in path.parts):
        return f"a name is longer than {longest} bytes"
    return None


def sha256_of(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Waits until the file's contents, or the folder's list of names, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder for this, and needs no such call
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to; on leaving without an error, what was written there takes the place of `path` at once.

    Args:
        path: the file to create or replace. Its folder is created when missing. After an error (disk full, Ctrl-C) the
            old file is untouched and nothing is left behind; after a kill a hidden `.writing-*` folder may remain.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    probe = aside / ".probe"
    probe.touch()
    try:
        yield aside / path.name
        os.chmod(aside / path.name, probe.stat().st_mode)  # safetensors makes files that only their owner can read
        flush_to_disk(aside / path.name)
        os.replace(aside / path.name, path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def rename_directory(source: Path, target: Path) -> None:
    """Renames a finished folder into place after everything inside has reached the disk; `target` must not exist."""
    for path in sorted(source.rglob("*")):
        flush_to_disk(path)
    flush_to_disk(source)
    os.rename(source, target)
    flush_to_disk(target.parent)
