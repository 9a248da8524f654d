"""How code of users is run: global state that it changes is set back, and what it raises is told apart from our errors.

A file that switches gradients off, seeds torch or changes the folder does so for its own sake; the training around it
would break, or would draw the same random numbers again and again.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from rlr_peft.errors import RewardError

logger = logging.getLogger(__name__)

NOT_THEIRS = (str(Path(__file__).parents[1]), str(importlib.__file__), "<frozen importlib")
OURS = "rlr_peft"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Setting:
    """A piece of global state.

    Attributes:
        name: in words.
        read: what it is now; comparable, and not changed by later writes.
        write: sets it to what `read` returned.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _set_default_device(device: torch.device) -> None:
    # None and not "cpu", which would slow down every call into torch.
    torch.set_default_device(None if device.type == "cpu" else device)


def _cudnn() -> tuple[bool, ...]:
    return torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


def _set_cudnn(flags: tuple[bool, ...]) -> None:
    torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # removed meanwhile
        return None


def _our_loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict
    return [entry for name, entry in known.items() if name.startswith(OURS) and isinstance(entry, logging.Logger)]


def _logging() -> tuple[Any, ...]:
    silenced = {one.name for one in _our_loggers() if one.disabled}
    root = logging.root
    return root.level, list(root.handlers), root.manager.disable, logging.getLogger(OURS).level, silenced


def _set_logging(state: tuple[Any, ...]) -> None:
    logging.root.level, logging.root.handlers[:], logging.root.manager.disable, level, silenced = state
    logging.getLogger(OURS).setLevel(level)  # also makes the loggers forget which levels were enabled
    for one in _our_loggers():
        one.disabled = one.name in silenced


@contextmanager
def _own_random_numbers(about: object) -> Iterator[None]:
    """Seeds all generators by what the code is called about, and sets them back.

    So it draws other numbers for other images, the same ones in a resumed run, and none of ours.
    """
    seed = zlib.crc32(repr(about).encode())
    has_cuda = torch.cuda.is_initialized()
    before = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    before_cuda = torch.cuda.get_rng_state_all() if has_cuda else []
    torch.default_generator.manual_seed(seed)
    if has_cuda:
        torch.cuda.manual_seed_all(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        numpy.random.set_state(before[1])
        random.setstate(before[2])
        if has_cuda:
            torch.cuda.set_rng_state_all(before_cuda)


SETTINGS = (
    _Setting("torch's grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting("torch's anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("torch's default device", torch.get_default_device, _set_default_device),
    _Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    _Setting(
        "torch's deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
    ),
    _Setting(
        "torch's precision of matrix products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    _Setting("cuDNN's flags", _cudnn, _set_cudnn),
    _Setting("NumPy's handling of errors", numpy.geterr, lambda errors: numpy.seterr(**errors)),
    _Setting("the working folder", _folder, os.chdir),
    _Setting("the logging", _logging, _set_logging),
    _Setting(
        "the handlers of signals",
        lambda: [signal.getsignal(number) for number in SIGNALS],
        lambda handlers: [signal.signal(number, handler) for number, handler in zip(SIGNALS, handlers)],
    ),
)


@contextmanager
def running_user_code(
    what: str, told: set[str], about: object = None, verb: str = "raised", details: str = ""
) -> Iterator[None]:
    """Around a call into a user's code.

    It draws from random generators of its own, as it were: seeding them again and again concerns nobody else.

    Args:
        what: the code in words, for messages: "reward 'rewards.py:sharpness'".
        told: which settings were said to be set back; they are not said again, and new ones are added.
        about: what seeds the random numbers that it draws, by its `repr`.
        verb: what an error did to it, in words.
        details: said behind an error.

    Raises:
        RewardError: the code raised, or left the program.
    """
    before = [setting.read() for setting in SETTINGS]
    try:
        with _own_random_numbers((what, about)):
            yield
    except (RewardError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split()):.1000}".removesuffix(": ")
        if isinstance(error, SystemExit):
            verb, details = "asked for the end of the program,", f"{details}; let it raise an error, or return"
        raise RewardError(f"{what} {verb} {words}{details}", _without_our_frames(error)) from error
    finally:
        changed = []
        for setting, value in zip(SETTINGS, before):
            if setting.read() != value:
                setting.write(value)
                changed.append(setting.name)
        new = [name for name in changed if name not in told]
        if new:
            told.update(new)
            logger.warning("%s changed %s, which was set back.", what[:1].upper() + what[1:], " and ".join(new))


@contextmanager
def loading_user_code(what: str, verb: str) -> Iterator[None]:
    """Around the import of a user's module, or the making of an object of it.

    As `running_user_code`; filters of warnings are set back too.

    Raises:
        RewardError: the code raised, or left the program.
    """
    with warnings.catch_warnings(), running_user_code(what, set(), verb=verb):
        yield


def _without_our_frames(error: BaseException) -> BaseException | None:
    """The error with a traceback that begins in the user's code; None if it did not come to that."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(NOT_THEIRS):
        traceback = traceback.tb_next
    return None if traceback is None else error.with_traceback(traceback)
