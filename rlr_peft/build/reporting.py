"""What a program says, how it starts and how it stops: logs without noise, errors that explain themselves as one clear
message, no long wait for a Hub that does not answer, and an orderly end at the first signal.
"""

import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from safetensors import SafetensorError

from rlr_peft.config import Config, ConfigError
from rlr_peft.errors import RewardError, UserError
from rlr_peft.foreign_text import MessageHandler, guard_terminal, say, say_traceback

SILENT = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel
    "diffusers.models.modeling_utils": "should be kept in float32: []",  # said of an empty list
}
"""Warnings that nobody can act on: the logger, and words of the message."""


def set_up_logging() -> None:
    """Our messages at INFO and bars from the main process, warnings from all, on stderr; to be called before torch is
    imported.

    Not shown is what a user can do nothing about: `SILENT`, and transformers' warnings, which say at import that
    torchvision is missing, and of every long prompt what `build/prompts.py` says once.
    """
    guard_terminal()
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[MessageHandler()])
    logging.getLogger("rlr_peft").setLevel(logging.INFO if is_main else logging.WARNING)
    if not is_main:
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: nothing is said twice
    for name in SILENT:
        logging.getLogger(name).addFilter(_can_be_acted_on)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _can_be_acted_on(record: logging.LogRecord) -> bool:
    return SILENT[record.name] not in record.getMessage()


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


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
AFTER_TRAINING = "Checkpoints that were saved are complete: go on with --resume_from_checkpoint latest."
WITHOUT_MEMORY = (
    "Lower --train_batch_size (and raise --gradient_accumulation_steps) or --decode_batch_size, or use "
    "--gradient_checkpointing, --vae_gradient_checkpointing or --offload; `rlr-peft plan --gpu_memory GIB` with the "
    "same config and flags says what takes the memory and which options help."
)


@contextmanager
def reporting_errors(afterwards: str = "") -> Iterator[None]:
    """Prints an explained error instead of a traceback and leaves with exit code 1 (2 for the config's).

    Where the user's own reward raised, the traceback into it follows, from its first line in their code on.

    Args:
        afterwards: what is left and how to go on, said after Ctrl-C and on a full disk.
    """
    try:
        yield
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        if isinstance(error, RewardError) and error.raised is not None:
            say_traceback(error.raised)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in NO_PATH:
            say(f"error: Expected a path, got {error.filename} ({error.strerror}); correct it.", sys.stderr)
            raise SystemExit(2) from None
        advice = _what_to_do(error)
        if advice is None:
            raise
        say(f"error: A file could not be read or written: {error}. {advice} {afterwards}".rstrip(), sys.stderr)
        raise SystemExit(1) from None
    except (RuntimeError, MemoryError) as error:
        whose = _memory_that_is_full(error)
        if whose is None:
            raise
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else "an allocation failed"
        say(f"error: {whose} memory is full: {reason}. {WITHOUT_MEMORY} {afterwards}".rstrip(), sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        say(f"Stopped at once. {afterwards}".rstrip(), sys.stderr)
        raise SystemExit(130) from None


def _what_to_do(error: OSError | SafetensorError) -> str | None:
    """What helps where a file cannot be written; None for an error of another kind."""

    def is_one_of(numbers: tuple[int, ...]) -> bool:
        if isinstance(error, OSError):
            return error.errno in numbers
        return any(f"(os error {number})" in str(error) for number in numbers)  # safetensors tells it in words alone

    if is_one_of(DISK_FULL):
        return "Free disk space."
    return "Change who may, or choose another place." if is_one_of(NOT_ALLOWED) else None


def _memory_that_is_full(error: RuntimeError | MemoryError) -> str | None:
    # Who has not imported torch yet cannot have got its error, and need not wait for it.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "The GPU's"
    # torch has no class of its own for the host's allocator.
    return "The host's" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) else None


@contextmanager
def as_config_error() -> Iterator[None]:
    """While a run is built, what libraries and builders refuse is a mistake in the config."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"The run cannot be built: {error}") from error


logger = logging.getLogger(__name__)

SECONDS = 3.0


def work_offline_without_hub() -> None:
    """Sets HF_HUB_OFFLINE where nothing answers at the Hub's address; to be called before huggingface_hub is imported.

    Its client would try again for about half a minute for every file that is not in the cache. What the user says by
    that variable, or by a proxy, stays as it is.
    """
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if "HF_HUB_OFFLINE" in os.environ or endpoint.scheme in getproxies() or endpoint.hostname is None:
        return
    try:
        port = endpoint.port or {"http": 80}.get(endpoint.scheme, 443)
        socket.create_connection((endpoint.hostname, port), timeout=SECONDS).close()
    except OSError:
        logger.warning("%s does not answer: only files in the cache are used.", endpoint.hostname)
        os.environ["HF_HUB_OFFLINE"] = "1"


def refuse_missing_rewards(config: Config) -> None:
    """Where only the cache is used, looks for the files of all rewards, before torch and the base are loaded.

    With a connection they are downloaded when the rewards are loaded, once the output folder is known to be free.

    Raises:
        RewardError: a file is missing; it names reward, repository, file and the command to get it.
    """
    from huggingface_hub import constants

    from rlr_peft.rewards.model_files import ModelFiles

    if not constants.HF_HUB_OFFLINE:
        return
    reward = config.reward
    files = ModelFiles(reward.reward_model_path, config.model.cache_dir)
    for spec in reward.specs:
        files.refuse_missing(spec, reward.vlm_endpoint)


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
