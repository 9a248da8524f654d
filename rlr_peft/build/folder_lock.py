"""One program at a time writes into an output folder: a lock that a killed owner does not leave behind.

On one machine the operating system's own lock (`flock`) decides: it goes with its process, however that ends. Network
file systems may not show it to other machines, or may not have it; then the file that names the owner decides: by the
owner's process id and start time on the same machine, by its last sign of life on another one.
"""

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from rlr_peft.build.processes import is_running, repeating
from rlr_peft.config import ConfigError
from rlr_peft.files import replacing_file

logger = logging.getLogger(__name__)

LOCK, OWNER = ".run.lock", ".run.json"
# Seconds between signs of life, and without one until an owner on another machine counts as dead.
BEAT, PATIENCE = 20.0, 180.0


@dataclass(frozen=True)
class Owner:
    """The process that writes into a folder.

    Attributes:
        host: its machine's name.
        boot: the kernel's number of its machine, which containers on one machine share; empty where there is none.
        process: its id.
        started: when the process started, in seconds since 1970: ids come again.
    """

    host: str
    boot: str
    process: int
    started: float

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.process} on {self.host} (started {since})"


class FolderInUseError(ConfigError):
    """Another program writes into the folder."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Inside, no other program that asks writes into the folder; what killed ones left half-written is removed.

    Of a run with several processes only the main one asks.

    Args:
        folder: made when missing.

    Raises:
        FolderInUseError: another program does, or may: the message names its host and process, and what to do.
        ConfigError: the folder cannot be made or written to.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        _refuse_living_owner(folder, is_locked=lock is not None)
        holder = _Holder(folder, lock, made)
    except OSError as error:
        raise ConfigError(
            f"Expected a folder to write to, or a place for one, got {folder} ({error.strerror}); choose another."
        ) from error
    try:
        _remove_half_written(folder)
        with repeating(BEAT, holder.beat):
            yield
    finally:
        holder.release()


def this_process() -> Owner:
    """This process as an owner."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    number = boot.read_text().strip() if boot.is_file() else ""
    return Owner(socket.gethostname(), number, os.getpid(), psutil.Process().create_time())


def _lock(folder: Path) -> FileLock | None:
    """The operating system's lock, taken; None on a file system that has none."""
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise _in_use(folder, _owner(folder)) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        logger.warning("%s has no file locks (%s): a second run that writes there may go unnoticed.", folder, error)
        return None
    return lock


def _refuse_living_owner(folder: Path, is_locked: bool) -> None:
    """Looks at the owner that the file names, which an orderly end removes."""
    owner, here = _owner(folder), this_process()
    if owner is None:
        return
    if owner.host == here.host or (owner.boot and owner.boot == here.boot):
        if not is_locked and is_running(owner.process, owner.started):
            raise _in_use(folder, owner)
    else:
        silent = _seconds_silent(folder)
        if silent < PATIENCE:
            raise FolderInUseError(
                f"Expected a folder that no other program writes to, got {folder}, which {owner} holds; its last "
                f"sign of life is {silent:.0f} s old, and no more can be seen from this machine. If it has ended, "
                f"start in {PATIENCE / 60:.0f} minutes, or remove {folder / OWNER} now. Else choose another folder."
            )
    logger.warning("%s ended without leaving %s in order (it was killed?): this run takes it over.", owner, folder)


def _in_use(folder: Path, owner: Owner | None) -> FolderInUseError:
    return FolderInUseError(
        f"Expected a folder that no other program writes to, got {folder}, to which {owner or 'another process'} "
        "writes; wait for its end, stop it, or choose another folder."
    )


def _seconds_silent(folder: Path) -> float:
    """Since the owner's last sign of life, by the clock of the file server: machines' clocks differ."""
    probe = folder / ".run.clock"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return max(0.0, now - (folder / OWNER).stat().st_mtime)


def _owner(folder: Path) -> Owner | None:
    """Who the file names; None if nobody, or if it cannot be read."""
    try:
        return Owner(**json.loads((folder / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _remove_half_written(folder: Path) -> None:
    """`.writing-*` folders of killed programs, those of earlier runs that were moved aside too.

    A folder inside with a lock of its own is another run's, which may be writing now.
    """
    for leftover in folder.rglob(".writing-*"):
        within = [folder / place for place in leftover.relative_to(folder).parents][:-1]
        if not any((place / LOCK).exists() for place in within):
            shutil.rmtree(leftover, ignore_errors=True)


class _Holder:
    """Holds a folder that this process has taken."""

    def __init__(self, folder: Path, lock: FileLock | None, made: list[Path]) -> None:
        self._folder, self._lock, self._made, self._me = folder, lock, made, this_process()
        self._sign()

    def beat(self) -> None:
        """A sign of life for other machines; takes the folder again after somebody removed it or the files."""
        if not self._folder.is_dir():
            return  # the next checkpoint makes it again
        try:
            if self._lock is not None and not (self._folder / LOCK).exists():
                self._lock.release()
                self._lock = _lock(self._folder)
            if (self._folder / OWNER).exists():
                os.utime(self._folder / OWNER)
            else:
                self._sign()
        except FolderInUseError as error:
            logger.error("%s was removed while this run wrote to it, and another run has it now: %s", LOCK, error)
        except OSError as error:  # a file server that does not answer now may answer the next time
            logger.debug("No sign of life in %s: %s", self._folder, error)

    def release(self) -> None:
        """Leaves the folder in order."""
        try:
            if _owner(self._folder) == self._me:
                (self._folder / OWNER).unlink(missing_ok=True)
            if self._made and {path.name for path in self._folder.iterdir()} <= {LOCK}:
                (self._folder / LOCK).unlink(missing_ok=True)  # a start that was refused leaves nothing behind
                for path in self._made:
                    path.rmdir()
        except OSError as error:  # the folder may be read-only by now: an error under way must not be replaced by this
            logger.debug("%s stays in %s: %s", OWNER, self._folder, error)
        if self._lock is not None:
            self._lock.release()  # its file stays where the folder does: removed now, it could be somebody's already

    def _sign(self) -> None:
        with replacing_file(self._folder / OWNER) as path:
            path.write_text(json.dumps(asdict(self._me)) + "\n", encoding="utf-8")
