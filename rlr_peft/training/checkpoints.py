"""Checkpoints that are complete or absent: folders `checkpoint-N` of the adapter, the state and a manifest.

The manifest lists the files with sizes and SHA-256 sums: by it a complete checkpoint is told from the rest.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlr_peft.build.machine import package_versions
from rlr_peft.errors import UserError
from rlr_peft.files import rename_directory, sha256_of, stays_inside

logger = logging.getLogger(__name__)

_PROCESS_STATES = "process_states"
# `.checkpoint-N.replaced-PID` is a complete checkpoint that a newer one of the same step was just taking the place of
_COMPLETE_NAME = re.compile(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.replaced-\d+")
_LEFTOVER_NAME = re.compile(r"\.checkpoint-\d+\.(tmp|replaced)-\d+")

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 9
# Far more than any checkpoint's: a crafted manifest is not read whole, and no number in it is used as it is.
_MOST_BYTES, _LARGEST = 1 << 24, 1 << 53


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read, or used in this run."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint holds, on the CPU.

    Attributes:
        path: its folder, which also holds the adapter's files.
        step: finished optimiser steps.
        state: the mapping given to `save`.
        process_state: what this process gave to `save`; None if there were fewer processes then.
    """

    path: Path
    step: int
    state: dict[str, Any]
    process_state: Any


class CheckpointManager:
    """Writes, finds, verifies, reads and deletes the checkpoints of one output folder.

    Args:
        output_dir: where the `checkpoint-N` folders are.
        total_limit: how many complete checkpoints to keep, at least 1; None keeps all.
        process_index: of this process; 0 writes, the others only hand over their state.
        gather: collects a list from every process into one list, in the order of the processes (accelerate's
            `gather_object`). Every process must call `save` when there are several.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        total_limit: int | None = None,
        num_processes: int = 1,
        process_index: int = 0,
        gather: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.total_limit = total_limit
        self.num_processes = num_processes
        self.process_index = process_index
        self.gather = gather

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        adapter_writer: Callable[[Path], object],
        *,
        process_state: Any = None,
    ) -> Path:
        """Writes `checkpoint-{step}` aside, forces it to the disk, and renames it into place.

        Args:
            state: name -> tensors, numbers, strings, and dicts, lists or tuples of them; each becomes `{name}.pt`.
                What `torch.load(weights_only=True)` would refuse is refused here, while the run can still be mended.
            adapter_writer: writes the adapter's files into the folder that it is given.
            process_state: of the same kinds as `state`, but one for each process: its random states, for example.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: it could not be written (disk full, for example); the earlier checkpoints are untouched.
        """
        target = self.output_dir / f"checkpoint-{step}"
        process_states = self.gather([process_state])
        if self.process_index != 0:
            return target
        aside = self.output_dir / f".checkpoint-{step}.tmp-{os.getpid()}"
        try:
            shutil.rmtree(aside, ignore_errors=True)  # in containers process numbers come again
            aside.mkdir(parents=True)
            adapter_writer(aside)
            for name, value in {**state, _PROCESS_STATES: process_states}.items():
                torch.save(value, aside / f"{name}.pt")
                load_tensors(aside / f"{name}.pt")
            write_manifest(aside, step=step, num_processes=self.num_processes)
            replaced = self.output_dir / f".checkpoint-{step}.replaced-{os.getpid()}"
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(target, replaced)
            rename_directory(aside, target)
        except Exception as error:
            raise CheckpointError(
                f"Could not write {target}: {type(error).__name__}: {error}. The earlier checkpoints are untouched: "
                "mend the cause (free disk space, for example) and go on with --resume_from_checkpoint latest."
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._delete_old(newest=target)
        return target

    def resolve(self, resume_from_checkpoint: str | None) -> Path | None:
        """The folder to resume from, verified against its manifest; None to start from scratch.

        Args:
            resume_from_checkpoint: None; `latest`, the newest complete checkpoint, passing over damaged ones with a
                warning for each; or the name of a folder in `output_dir`, or a path.

        Raises:
            CheckpointError: the named checkpoint is missing or damaged, or there are some but none is complete.
        """
        if resume_from_checkpoint is None:
            return None
        if resume_from_checkpoint == "latest":
            path = self._latest()
            if path is None:
                logger.warning("No checkpoint in %s: starting from scratch.", self.output_dir)
                return None
        else:
            inside = self.output_dir / resume_from_checkpoint
            path = inside if inside.is_dir() else Path(resume_from_checkpoint)
            if not path.is_dir():
                known = ", ".join(folder.name for _, folder in checkpoint_folders(self.output_dir))
                raise CheckpointError(
                    f"No checkpoint {resume_from_checkpoint!r}: neither {inside} nor {path} is a folder. "
                    f"There are: {known or 'none'}."
                )
            try:
                read_manifest(path)
            except CheckpointError as error:
                raise CheckpointError(
                    f"The checkpoint {path} cannot be used: {error}. Name another one, or `latest` to take the newest "
                    "complete one."
                ) from None
        return path

    def load(self, checkpoint: Path) -> LoadedCheckpoint:
        """Reads a folder that `resolve` returned; warns when other packages or processes wrote it."""
        manifest = read_manifest(checkpoint, check_sums=False)
        if manifest["num_processes"] != self.num_processes:
            logger.warning(
                "%s was written by %d processes and this run has %d: its updates are those of then, up to rounding, as "
                "long as train_batch_size x gradient_accumulation_steps x processes is what it was.",
                *(checkpoint, manifest["num_processes"], self.num_processes),
            )
        here = package_versions()
        changed = [
            f"{name} {written} -> {here.get(name, 'none')}"
            for name, written in manifest["packages"].items()
            if here.get(name) != written
        ]
        if changed:
            logger.warning(
                "%s was written with other package versions (%s): the resumed run may differ in the last digits.",
                checkpoint,
                ", ".join(changed),
            )
        with understanding(checkpoint):
            state = {
                name.removesuffix(".pt"): load_tensors(checkpoint / name)
                for name in manifest["files"]
                if name.endswith(".pt")
            }
            process_states, own = state.pop(_PROCESS_STATES), None
            if self.process_index < manifest["num_processes"]:
                own = process_states[self.process_index]
            return LoadedCheckpoint(checkpoint, manifest["step"], state, own)

    def _latest(self) -> Path | None:
        """The newest complete one; None where there is none at all, as before the first save of a run."""
        folders = checkpoint_folders(self.output_dir)
        for _, path in reversed(folders):
            try:
                read_manifest(path)
                return path
            except CheckpointError as error:
                logger.warning("Passing over %s: %s.", path, error)
        if folders:
            raise CheckpointError(
                f"None of the {len(folders)} checkpoints in {self.output_dir} can be used (see above). To start from "
                "scratch leave --resume_from_checkpoint out: they are then moved out of the way."
            )
        return None

    def _delete_old(self, newest: Path) -> None:
        """Removes leftovers of interrupted saves, and the oldest complete checkpoints beyond the limit."""
        for path in self.output_dir.iterdir():
            if _LEFTOVER_NAME.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        if self.total_limit is None:
            return
        complete = []
        for _, path in checkpoint_folders(self.output_dir):
            try:
                read_manifest(path, check_sums=False)
            except CheckpointError:
                continue  # damaged ones neither count nor get deleted: their owner may want to look
            if path != newest:
                complete.append(path)
        for path in complete[: max(0, len(complete) + 1 - self.total_limit)]:
            doomed = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            os.rename(path, doomed)  # first out of sight, so that a kill leaves no half-deleted checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def understanding(checkpoint: Path) -> Iterator[None]:
    """Inside, what a checkpoint holds is read and used: whole files may still hold what this program never wrote.

    Raises:
        CheckpointError: they do.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _not_ours(checkpoint, error) from error
    except pickle.UnpicklingError as error:  # it goes on for a page, with advice to switch the protection off
        raise _not_ours(checkpoint, "a file of it holds more than numbers and names") from error


def _not_ours(checkpoint: Path, why: object) -> CheckpointError:
    words = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else str(why)
    return CheckpointError(
        f"The checkpoint {checkpoint} is whole, but does not hold what this program saves ({words[:200]}). "
        "It was changed, or written by another program: resume from another one."
    )


def checkpoint_folders(output_dir: Path) -> list[tuple[int, Path]]:
    """Step and path of what is named like a finished checkpoint, oldest step first."""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _COMPLETE_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1] or match[2]), path))
    return sorted(found, key=lambda item: (item[0], not item[1].name.startswith(".")))


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote.

    Raises:
        ValueError: the file is no whole archive.
    """
    try:
        zipfile.ZipFile(path).close()  # torch says of an empty one that the disk's answer was wrong
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path.name} holds no tensors") from error
    return torch.load(path, map_location="cpu", weights_only=True)


def write_manifest(folder: Path, *, step: int, num_processes: int) -> None:
    """Describes every file now in `folder`, subfolders included; to be called when nothing more will be written."""
    contents: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "num_processes": num_processes,
        "packages": package_versions(),
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    contents["manifest_sha256"] = _sha256_of_contents(contents)
    (folder / MANIFEST_NAME).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, check_sums: bool = True) -> dict[str, Any]:
    """The manifest, after comparing the folder's files with it.

    Args:
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
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes instead of {expected['size']}")
        if check_sums and sha256_of(path) != expected["sha256"]:
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
        if not stays_inside(name) or "\\" in name or len(name) > 255:
            raise CheckpointError(f"its {MANIFEST_NAME} names {name[:80]!r}, which is not a file in its folder")
        if not (isinstance(expected, dict) and _is_number(expected.get("size"), 0) and "sha256" in expected):
            raise CheckpointError(f"its {MANIFEST_NAME} is damaged or not of this program (its entry {name!r} is odd)")


def _is_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _sha256_of_contents(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
