"""Stopping between two steps: the first SIGTERM or Ctrl-C asks for a checkpoint and an orderly end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from rlr_peft.build.processes import repeating

LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run")


class GracefulInterruption:
    """Inside this context, SIGTERM and SIGINT set a flag instead of ending the process.

    The training loop looks at `exit_code` after every step; where it is not 0, the loop saves a checkpoint, leaves the
    context and exits with it. A SIGINT after that first signal raises KeyboardInterrupt at once. The former handlers
    are back when the context ends. Only the main thread can enter it (as Python demands for signals).

    With several processes a signal may reach one of them a step before the others: take the largest `exit_code` of all
    processes at the same place of every step before acting on it.

    Attributes:
        signal_number: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._former_handlers: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 143 for SIGTERM, 130 for SIGINT; 0 when none came."""
        return 128 + self.signal_number if self.signal_number is not None else 0

    def __enter__(self) -> "GracefulInterruption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former_handlers.items():
            # None stands for a handler that was not set from Python: it cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former_handlers.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal_number = number
        name = signal.Signals(number).name
        # straight to the file: a print may be what the signal has interrupted, and print cannot be entered twice
        os.write(2, f"\n{name}: finishing this step, then saving a checkpoint. Ctrl-C now stops at once.\n".encode())


@contextmanager
def stopping_with_launcher() -> Iterator[None]:
    """Inside, the end of the launcher that started this process counts as a SIGTERM, whatever ended it.

    `accelerate launch` of one process does not pass signals on: a training would run on without anybody. Only a
    launcher is watched: a program behind `nohup` outlives its shell on purpose.
    """
    launcher = os.getppid()
    if not _is_launcher(launcher):
        yield
        return
    said = False

    def look() -> None:
        nonlocal said
        if os.getppid() == launcher or said:
            return
        said = True
        os.write(2, f"\nThe launcher (process {launcher}) has ended: stopping as on SIGTERM.\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)

    with repeating(1.0, look):
        yield


def _is_launcher(process: int) -> bool:
    try:
        words = psutil.Process(process).cmdline()[:4]
    except psutil.Error:
        return False
    return any(word in LAUNCHERS or Path(word).name in LAUNCHERS for word in words)
