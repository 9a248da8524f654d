"""A checkpoint's list of files, sizes and SHA-256 sums: how a complete checkpoint is told from the rest."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlr_peft.durable_files import stays_inside
from rlr_peft.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 3
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "rlr-peft")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read, or used in this run."""


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide whether a resumed run repeats bit for bit."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


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
        contents: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        recorded_sum = contents.pop("manifest_sha256")
    except FileNotFoundError:
        raise CheckpointError(f"it has no {MANIFEST_NAME}, so it was never finished") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"its {MANIFEST_NAME} is damaged ({error})") from None
    if recorded_sum != _sha256_of_contents(contents):
        raise CheckpointError(f"its {MANIFEST_NAME} is damaged (its own sum is wrong)")
    if contents["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"its format version is {contents['format_version']}, this program reads {FORMAT_VERSION}: "
            "use the rlr-peft release that wrote it"
        )
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


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of_contents(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
