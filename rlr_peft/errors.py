"""Errors that explain themselves to the user: what was expected, what was got, and what to do.

Among them: packages that a plain install leaves out, because few runs need them.
"""

import difflib
import importlib
import os
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from rlr_peft.foreign_text import printable
from rlr_peft.redaction import redacted

LONGEST_LINE = 1200  # characters; of a longer one the beginning and the end are shown, which hold place and advice
_BEGINNING, _END = 800, 300


class UserError(Exception):
    """Its message is all that a user needs; the programs print it without a traceback.

    What it quotes may hold a secret, such as the address of a reward server: that is crossed out when it is made, so
    that whoever shows or keeps it need not think of it.

    Each argument is a line of the message. What it repeats of files and servers neither breaks a line nor makes it
    endless: line breaks and control characters are written out, and a very long line is cut in the middle.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*(redacted(line) for line in lines))

    def __str__(self) -> str:
        return "\n".join(_line(str(argument)) for argument in self.args)


def _line(text: str) -> str:
    if len(text) > LONGEST_LINE:
        text = f"{text[:_BEGINNING]} [...] {text[-_END:]}"
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class RewardError(UserError, ValueError):
    """A reward could not be loaded, failed, or returned something that is not one finite number per image.

    Args:
        message: what was expected, what was got, and what to do.
        raised: what a user's own code raised; its traceback tells where in that code, and holds no frame of ours.
    """

    def __init__(self, message: str, raised: BaseException | None = None) -> None:
        super().__init__(message)
        self.raised = raised


def nearest_path(place: str) -> str | None:
    """The existing path that a mistyped one most likely means; None where nothing is like it.

    The first part that is not there is looked for among its neighbours; the rest is kept where that exists.
    """
    parts = Path(os.path.expanduser(place)).parts
    # os.path.exists takes whatever people type, where Path.exists raises for a very long name.
    depth = next((n for n in range(len(parts)) if not os.path.exists(Path(*parts[: n + 1]))), len(parts))
    folder, rest = Path(*parts[:depth]), parts[depth:]
    names = os.listdir(folder) if rest and folder.is_dir() and os.access(folder, os.R_OK) else []
    near = difflib.get_close_matches(rest[0], names, n=1) if names else []
    if not near:
        return None
    whole = folder.joinpath(near[0], *rest[1:])
    return str(whole if os.path.exists(whole) else folder / near[0])


def did_you_mean(place: str, names: Collection[str] = ()) -> str:
    """` Did you mean sdxl?` for the end of a message, of what is neither one of the names nor a path; or nothing."""
    near = (*difflib.get_close_matches(place, names, n=1, cutoff=0.8), nearest_path(place))[0]
    return "" if near is None else f" Did you mean {near}?"


def extra(module: str, name: str, wanted_by: str) -> ModuleType:
    """Imports an optional package.

    Args:
        name: the extra of `pip install 'rlr-peft[NAME]'` that brings it.
        wanted_by: the option that cannot do without, as a user writes it.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{wanted_by}: expected the package {module}, which cannot be imported here ({error}). "
            f"Run `pip install 'rlr-peft[{name}]'`, or leave {wanted_by} out."
        ) from error
