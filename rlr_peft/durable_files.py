"""Files that are complete or absent, even after a power cut; places to write to; names that stay inside a folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""The adapter's file: the one name that `pipeline.load_lora_weights(folder_or_repo)` finds by itself."""

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
