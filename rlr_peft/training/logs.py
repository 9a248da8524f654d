"""Calm logs: our own messages, and of the libraries' only what a person can act upon."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rlr_peft.redaction import redacted


def set_up_logging() -> None:
    """Our messages at INFO from the main process, warnings from all, on stderr; to be called before torch is imported.

    bitsandbytes and transformers report at import what optional accelerations they lack: nothing of it is used here.
    No message of anybody, nor the traceback that ends a program, shows a secret: clients log the addresses they ask.
    """
    logging.setLogRecordFactory(_RedactedRecord)
    sys.excepthook = _print_redacted
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("rlr_peft").setLevel(logging.INFO if is_main else logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class _RedactedRecord(logging.LogRecord):
    """What any logger of the process is told, libraries' own handlers included."""

    def getMessage(self) -> str:  # noqa: N802 (logging's own name)
        return redacted(super().getMessage())

    @property
    def exc_text(self) -> str | None:
        return redacted("".join(traceback.format_exception(*self.exc_info)).rstrip()) if self.exc_info else None

    @exc_text.setter
    def exc_text(self, text: str | None) -> None:
        pass


def print_traceback(error: BaseException) -> None:
    """Prints the traceback as Python does, without secrets."""
    print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print_traceback(error.with_traceback(trace))


def hide_loading_bars() -> None:
    """Turns off the libraries' progress bars while a pipeline is loaded; ours stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def errors_only() -> Iterator[None]:
    """Silences our warnings and the libraries', and gives back the levels that there were."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    ours = logging.getLogger("rlr_peft")
    before = ours.level, diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    ours.setLevel(logging.ERROR)
    diffusers_logging.set_verbosity(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(before[0])
        diffusers_logging.set_verbosity(before[1])
        transformers_logging.set_verbosity(before[2])
