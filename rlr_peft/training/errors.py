"""Errors that explain themselves end the program with one clear message."""

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from rlr_peft.config import ConfigError
from rlr_peft.errors import UserError
from rlr_peft.rewards.errors import RewardError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STOPPED = "Stopped at once; checkpoints that were saved are complete: go on with --resume_from_checkpoint latest."


@contextmanager
def reporting_errors(when_stopped: str = STOPPED) -> Iterator[None]:
    """Prints an explained error instead of a traceback and leaves with exit code 1 (2 for the config's).

    Where the user's own reward raised, the traceback into it comes first.

    Args:
        when_stopped: what Ctrl-C is answered with.
    """
    try:
        yield
    except UserError as error:
        if isinstance(error, RewardError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except (OSError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise
        print(
            f"error: A file could not be written: {error}. Checkpoints that were saved are complete: free disk space "
            "and go on with --resume_from_checkpoint latest.",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        raise SystemExit(130) from None


def _is_disk_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return any(f"(os error {number})" in str(error) for number in DISK_FULL)  # safetensors tells it in words alone


@contextmanager
def as_config_error() -> Iterator[None]:
    """While a run is built, what libraries and builders refuse is a mistake in the config."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"The run cannot be built: {error}") from error
