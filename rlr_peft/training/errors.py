"""Errors that explain themselves end the program with one clear message."""

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


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Prints an explained error instead of a traceback and leaves with exit code 1."""
    try:
        yield
    except EXPLAINED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
