"""A checkpoint's list of files, sizes and SHA-256 sums: how a complete checkpoint is told from the rest."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from rlr_peft.build.machine import package_versions
from rlr_peft.durable_files import stays_inside
from rlr_peft.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 4
# Far more than any checkpoint's: a crafted manifest is not read whole, and no number in it is used as it is.
_MOST_BYTES, _LARGEST = 1 << 24, 1 << 53


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read, or used in this run."""


def write_manifest(folder: Path, *, step: int, num_processes: int) -> None:
    """Describes every file now in `folder`, subfolders included; to be called when nothing more will be written."""
    contents: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "num_processes": num_processes,
        "packages": package_versions(),
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256_of_file(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    contents["manifest_sha256"] = _sha256_of_contents(contents)
    (folder / MANIFEST_NAME).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, check_sums: bool = True) -> dict[str, Any]:
    """The manifest, after comparing the folder's files with it.

    Args:
        folder: the checkpoint.
        check_sums: also read every file and compare its SHA-256 sum; otherwise only presence and size.

    Raises:
        CheckpointError: in a few words, what is missing or damaged.
    """
    try:
        if not (folder / MANIFEST_NAME).is_file():
            raise CheckpointError(f"it has no {MANIFEST_NAME}, so it was never finished")
        with (folder / MANIFEST_NAME).open("rb") as file:
            contents: dict[str, Any] = json.loads(file.read(_MOST_BYTES))
        recorded_sum = contents.pop("manifest_sha256")
        own_sum = _sha256_of_contents(contents)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"its {MANIFEST_NAME} is damaged ({error})") from None
    if recorded_sum != own_sum:
        raise CheckpointError(f"its {MANIFEST_NAME} is damaged (its own sum is wrong)")
    if contents.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"its format version is {str(contents.get('format_version'))[:20]}, this program reads {FORMAT_VERSION}: "
            "use the rlr-peft release that wrote it"
        )
    _check_contents(contents)
    for name, expected in contents["files"].items():
        path = folder / name
        if not stays_inside(name):
            raise CheckpointError(f"its {MANIFEST_NAME} names {name!r}, which is no file of its folder")
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        if check_sums and _sha256_of_file(path) != expected["sha256"]:
            raise CheckpointError(f"{name} is damaged (its SHA-256 sum is wrong)")
    return contents


def _check_contents(contents: dict[str, Any]) -> None:
    """A sum that is right says that the file is whole, not that this program wrote it."""
    problems = [
        *(name for name, least in (("step", 0), ("num_processes", 1)) if not _is_number(contents.get(name), least)),
        *(name for name in ("packages", "files") if not isinstance(contents.get(name), dict)),
    ]
    if problems:
        raise CheckpointError(f"its {MANIFEST_NAME} is damaged or not of this program (its {problems[0]} is odd)")
    for name, expected in contents["files"].items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or len(name) > 255:
            raise CheckpointError(f"its {MANIFEST_NAME} names {name[:80]!r}, which is not a file in its folder")
        if not (isinstance(expected, dict) and _is_number(expected.get("size"), 0) and "sha256" in expected):
            raise CheckpointError(f"its {MANIFEST_NAME} is damaged or not of this program (its entry {name!r} is odd)")


def _is_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of_contents(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
