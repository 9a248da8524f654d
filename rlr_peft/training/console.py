"""What a person at the console sees: calm logs, and one clear message where a run cannot go on."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rlr_peft.config import ConfigError
from rlr_peft.estimators.coverage import CoverageError
from rlr_peft.lora import AdapterMismatchError
from rlr_peft.prompts.sources import PromptError
from rlr_peft.rewards.base import RewardError
from rlr_peft.training.manifest import CheckpointError

EXPLAINED_ERRORS = (
    ConfigError,
    PromptError,
    RewardError,
    CoverageError,
    CheckpointError,
    AdapterMismatchError,
    FloatingPointError,
)


def set_up_logging() -> None:
    """Our messages at INFO from the main process, warnings from all, on stderr."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("rlr_peft").setLevel(logging.INFO if is_main else logging.WARNING)


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Errors that explain themselves end the program with their message and exit code 1, without a traceback."""
    try:
        yield
    except EXPLAINED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
