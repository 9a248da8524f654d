"""Errors that explain themselves end the program with one clear message."""

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from rlr_peft.config import ConfigError
from rlr_peft.errors import UserError
from rlr_peft.rewards.errors import RewardError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def reporting_errors(when_stopped: str = "Stopped at once; the last checkpoint is complete.") -> Iterator[None]:
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
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(
            f"error: A file could not be written: {error}. The last checkpoint is complete: free disk space and go on "
            "with --resume_from_checkpoint latest.",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except RuntimeError as error:
        if not _is_out_of_gpu_memory(error):
            raise
        print(
            f"error: The GPU's memory is full: {str(error).splitlines()[0]} `rlr-peft plan --gpu_memory GIB` with the "
            "same config and flags says what takes it and which options help; docs/memory.md lists them.",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        raise SystemExit(130) from None


def _is_out_of_gpu_memory(error: RuntimeError) -> bool:
    # Who has not imported torch yet cannot have got its error, and need not wait for it.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


@contextmanager
def as_config_error() -> Iterator[None]:
    """While a run is built, what libraries and builders refuse is a mistake in the config."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"The run cannot be built: {error}") from error
