"""Calm logs: our own messages, and of the libraries' only what a person can act upon."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rlr_peft.foreign_text import guard_terminal


def set_up_logging() -> None:
    """Our messages at INFO from the main process, warnings from all, on stderr; to be called before torch is imported.

    bitsandbytes and transformers report at import what optional accelerations they lack: nothing of it is used here.
    """
    guard_terminal()
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("rlr_peft").setLevel(logging.INFO if is_main else logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


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
