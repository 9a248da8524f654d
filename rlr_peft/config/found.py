"""A config that was not given but found, beside an adapter that may be somebody else's: what of it is taken.

Its words can make the program run code (a reward's file or module), connect and send (addresses of rewards and language
models), write (folders, caches) or show what lies on this machine (files of prompts). So of texts only those are taken
whose knob says of what kind they are (`knob(found=...)`), and only as far as they are harmless:

- `words`: any text: it is compared, shown or drawn;
- `model`: a Hub id or a local folder, of which weights and configs are read, never code;
- `prompts`: a built-in set, or a file in the config's own folder; of several sources Hub ids of datasets too;
- `dataset`: a Hub id;
- `reward`: a registered name.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rlr_peft.config.arguments import knobs
from rlr_peft.config.knob import Knob
from rlr_peft.config.parsing import read_config
from rlr_peft.config.prompts import BUILTIN_SETS, is_hub_dataset

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # no colon: every form of a reward but the registered names has one


def config_beside(adapter: str) -> Path | None:
    """The config of the run that left this adapter, if it lies on this machine."""
    folder = Path(adapter).expanduser()
    folder = folder.parent if folder.is_file() else folder
    places = [folder / "config.yaml"]
    if folder.name.startswith("checkpoint-"):
        places.append(folder.parent / "config.yaml")
    return next((place for place in places if place.is_file()), None)


def read_found_config(path: Path, names: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The plain values of a config that was found, and the names of those that were left out, in part or whole.

    Args:
        names: those that matter; the others are passed over.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown name or a wrong type.
    """
    given = {name: value for name, value in read_config(path, names).items() if value != knobs()[name].default}
    kept = {name: _plain(knobs()[name], value, path.parent) for name, value in given.items()}
    left_out = [name for name, value in given.items() if kept[name] != value]
    return {name: value for name, value in kept.items() if value is not None}, left_out


def _plain(knob: Knob, value: Any, folder: Path) -> Any:
    """As much of a value as is harmless; None for nothing."""
    if isinstance(value, dict):
        takes_datasets = knob.field.metadata["found"] == "prompts"
        return {
            key: item
            for key, item in value.items()
            if _is_harmless(knob, key, folder) or (takes_datasets and is_hub_dataset(key))
        } or None
    if isinstance(value, tuple):
        return tuple(item for item in value if not isinstance(item, str) or _is_harmless(knob, item, folder)) or None
    is_text = isinstance(value, str) and knob.takes_text
    return value if not is_text or _is_harmless(knob, value, folder) else None


def _is_harmless(knob: Knob, text: str, folder: Path) -> bool:
    match knob.field.metadata["found"]:
        case "words":
            return True
        case "model":
            # No address, and no folder of another machine.
            return "://" not in text and not text.startswith(("//", "\\\\"))
        case "prompts":
            return text in BUILTIN_SETS or _is_file_inside(Path(text).expanduser(), folder)
        case "dataset":
            return _NAME.fullmatch(text) is not None and not os.path.exists(text)
        case "reward":
            return _NAME.fullmatch(text) is not None
        case _:
            return False


def _is_file_inside(path: Path, folder: Path) -> bool:
    """Links are followed: one that came with the folder may point anywhere."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())
