"""How inputs are made: a sound one is damaged byte by byte, or gets values where nobody expects them."""

import json
import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEEP = 3000
TEXTS = [
    *("", " ", "\0", "\x1b[2J", "\u202e", "\ud800", "\ufeff", "a" * 100_000, "[" * DEEP, '{"a":' * DEEP, "9" * 6000),
    *("../../out", "/etc/passwd", "C:\\x", "~", "null", "true", "nan", "-inf", "1e400", "0x10", "1_000", "%s", "{}"),
    *("(a+)+$", "(.*.*.*)*!", "(", "&a [*a]", "!!python/object:os.system x", "<<: 1", "line\nline", "http://[::1", "@"),
]
NUMBERS: list[Any] = [0, 1, -1, 2**31, 2**63, 10**400, 1e308, 1e-320, 0.5, float("nan"), float("inf"), True, False]
BYTES = [b"\0", b"\xff\xfe", b"\n", b"\r", b'"', b",", b"\\", b"{", b"[", b"]", b"}", b"-", b"\xc3", b"\xe2\x80\xae"]


class FindingError(Exception):
    """What a target finds wrong, in words."""


class Target(ABC):
    """A door of the program.

    Args:
        folder: for the input's files; the working folder too.
    """

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def attempt(self, chance: random.Random) -> bool:
        """Makes one input and gives it to the program.

        Returns:
            Whether it was accepted.

        Raises:
            UserError: it was refused.
            FindingError: something is wrong.
        """


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, lost, doubled, moved or added."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        at = chance.randrange(len(changed) + 1)
        length = min(chance.choice([1, 1, 4, 50, 5000]), len(changed) - at)
        match chance.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at : at + length] = chance.randbytes(length)
            case 4:
                changed[at:at] = chance.choice(BYTES)
            case 5 if chance.random() < 0.3:
                del changed[at:]
    return bytes(changed)


def odd(chance: random.Random, depth: int = 0) -> Any:
    """A value that JSON can hold, or nearly."""
    match chance.randrange(8 if depth < 3 else 5):
        case 0:
            return None
        case 1 | 2:
            return chance.choice(NUMBERS)
        case 3 | 4:
            return chance.choice(TEXTS)
        case 5:
            return [odd(chance, depth + 1) for _ in range(chance.choice([0, 1, 2, 5]))]
        case 6:
            return {
                chance.choice([*TEXTS[:3], "a", "text"]): odd(chance, depth + 1) for _ in range(chance.randrange(3))
            }
        case _:
            return [odd(chance, depth + 1)] * 2


def bent(value: Any, chance: random.Random) -> Any:
    """The same plain value with an odd one somewhere in it, or a name that is lost or new."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        match chance.randrange(6):
            case 0:
                return {name: kept for name, kept in value.items() if name != key}
            case 1:
                return value | {chance.choice(TEXTS): odd(chance)}
            case _:
                return value | {key: bent(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        kept = [] if chance.random() < 0.2 else [bent(value[at], chance)]
        return [*value[:at], *kept, *value[at + 1 :]]
    return odd(chance)


def as_json(value: Any, chance: random.Random) -> bytes:
    """The value, sometimes with a key twice or damaged."""
    content = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
    if chance.random() < 0.1:
        content = content[:1] + b'"a": 1, "a": 2, ' + content[1:]
    return damaged(content, chance) if chance.random() < 0.3 else content
