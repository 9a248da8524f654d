"""Signs of life: something done every few seconds beside the work, and whether another process lives."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def repeating(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Inside, a thread of its own calls `action` again and again; it must not raise, and ends with the program."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(seconds):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(seconds + 1)


def is_running(process: int, started: float | None = None) -> bool:
    """Whether a process of this machine lives; with `started`, in seconds since 1970, whether it is still that one."""
    try:
        found = psutil.Process(process)
        # Clocks are set now and then, by which the start of a living process moves a little.
        is_same = started is None or abs(found.create_time() - started) < 5
        return bool(is_same and found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
