"""Rewards from user code: `package.module:callable` and `path/to/file.py:callable`.

The callable is a function or an object, or a class that is instantiated without arguments (and may keep state). It
takes `(images, prompts)` or `(images, prompts, metadata)` and returns what `scores.check_scores` accepts. A third
positional argument receives the metadata when it is called `metadata` or has no default value. Beside the scores it may
return info, `(scores, info)`: numbers that are logged (see `scores.info_of`). Its attribute `takes_video = True` asks
for whole videos (B, F, 3, H, W); otherwise it gets their frames as images; `takes_latents = True` for clean latents.

Whether it is differentiable is read from its attribute `differentiable` when there is one. Otherwise it is found out
once, by `CallableReward.settle` on the first images of the run. Global state that its code changes is set back: a file
that switches gradients off, seeds torch or changes the folder does so for its own sake. What it raises is told apart
from our errors.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import random
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

from rlr_peft.errors import RewardError, did_you_mean
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.scores import check_scores, info_of, is_attached

logger = logging.getLogger(__name__)

PROBE_BATCH_SIZE = 2  # enough to find out about the gradient, few enough to be cheap

EXPECTED_ARGUMENTS = "(images, prompts) or (images, prompts, metadata)"


class CallableReward(Reward):
    """A user's callable as a reward.

    Raises:
        RewardError: `function` cannot take the arguments of a reward, does not return when it is called (it has a
            `yield` or is `async`), or its `differentiable` is not a bool.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function
        _check_returns(name, function)
        self._passes_metadata = _passes_metadata(name, function)
        declared = getattr(function, "differentiable", None)
        if declared is not None and not isinstance(declared, bool):
            raise RewardError(
                f"reward '{name}': its attribute `differentiable` must be True or False, got {declared!r}"
            )
        self.differentiable = declared
        self.takes_video = bool(getattr(function, "takes_video", False))
        self.takes_latents = bool(getattr(function, "takes_latents", False))
        self._set_back: set[str] = set()

    def settle(self, images: Tensor, prompts: list[str], metadata: Metadata) -> bool:
        """Find out, once, whether scores carry a gradient to images; later calls return the first answer.

        The callable is called on the first two images (of videos that it does not take, on the first frames), which
        require grad. It is differentiable if its scores are connected to them; it is not if they are cut off, or if it
        raises and works on images that do not require grad (as `images.numpy()` does).

        Raises:
            RewardError: the callable fails on the images either way, or its scores are refused.
        """
        if self.differentiable is not None:
            return self.differentiable
        if images.ndim == 5 and not self.takes_video and not self.takes_latents:
            images = images[:, 0]
        few = images[:PROBE_BATCH_SIZE].detach()
        texts, entries = prompts[:PROBE_BATCH_SIZE], metadata[:PROBE_BATCH_SIZE]
        reason: object = "its scores are cut off from the images"
        attached: bool | None = None
        with torch.enable_grad():
            leaf = few.clone().requires_grad_(True)
            try:
                attached = is_attached(self(leaf, texts, entries).scores, leaf)
            except RewardError as error:
                reason = error.__cause__ or error
            if attached is None:  # not above, where a second error would come with the first one's traceback
                self(few, texts, entries)
        self.differentiable = bool(attached)
        if not attached:
            advice = "If that is meant, `differentiable = False` on it says so."
            logger.warning("Reward '%s' counts as not differentiable: %s. %s", self.name, reason, advice)
        return self.differentiable

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Scores, and the info if there is any.

        Raises:
            RewardError: the callable raised, or its scores are refused by `check_scores`.
        """
        returned = self._call(images, prompts, metadata)
        if isinstance(returned, Scored):  # of a user's own subclass of `Reward`
            returned = returned.scores, returned.logged
        return Scored(check_scores(self.name, returned, prompts), info=info_of(returned, len(prompts)))

    def state_dict(self) -> dict[str, Any]:
        """What `settle` found out."""
        return {"differentiable": self.differentiable}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it, unless the callable now says so itself."""
        if self.differentiable is None:
            self.differentiable = state.get("differentiable")

    def _call(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Any:
        # Copies, which the code may change in place: other rewards, and the next update, are still to see what there
        # was. Metadata entry by entry, since samples of a prompt and frames of a video share theirs.
        texts = list(prompts)
        arguments: tuple[Any, ...] = (images.clone(), texts)
        keywords: dict[str, Any] = {}
        if self._passes_metadata == "positional":
            arguments = (*arguments, [copy.deepcopy(entry) for entry in metadata])
        elif self._passes_metadata == "keyword":
            keywords = {"metadata": [copy.deepcopy(entry) for entry in metadata]}
        details = f" (called with images of shape {tuple(images.shape)} and {len(prompts)} prompts)"
        about = float(images.detach().sum(dtype=torch.float64)), texts
        with running_user_code(f"reward '{self.name}'", self._set_back, about, details=details):
            return self._function(*arguments, **keywords)


def load_callable_reward(spec: str, device: str | torch.device = "cpu") -> CallableReward:
    """Load `package.module:callable` or `path/to/file.py:callable`.

    Args:
        spec: what to load. A file is imported under a private name, and its folder is not put on the import path.
        device: where a `torch.nn.Module` is moved to (it is also put in evaluation mode and frozen); other callables
            must follow the device of the images themselves.

    Raises:
        RewardError: nothing there, it fails while being imported or instantiated, or it is not callable.
    """
    location, _, attribute = spec.rpartition(":")
    if not location or not attribute:
        raise RewardError(f"reward '{spec}': expected `package.module:callable` or `path/to/file.py:callable`")
    is_file = location.endswith(".py")
    module = _import_file(Path(location).expanduser()) if is_file else _import_module(location)
    # Only the file's own name goes into metrics and the model card: folders are nobody else's business.
    name = f"{Path(location).name if is_file else location}:{attribute}"
    function = getattr(module, attribute, None)
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, public, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(sorted(public)) or 'no callable'}"
        raise RewardError(f"reward '{spec}': '{location}' has no '{attribute}'; {hint}")
    return reward_of(name, function, device)


def reward_of(name: str, function: Any, device: str | torch.device) -> CallableReward:
    """What a user's function, callable object or class of one is as a reward; args and errors as when it is loaded."""
    if inspect.isclass(function):
        with loading_user_code(f"reward '{name}'", "cannot be instantiated without arguments:"):
            function = function()
    if not callable(function):
        raise RewardError(
            f"reward '{name}': expected a function or a callable object taking {EXPECTED_ARGUMENTS}, "
            f"got {type(function).__name__}"
        )
    if isinstance(function, torch.nn.Module):
        function.to(device).eval().requires_grad_(False)
    return CallableReward(name, function)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RewardError(
            f"reward file '{path}' {what} (looked for it from {Path.cwd()}); give the path of a .py file."
            f"{'' if path.is_dir() else did_you_mean(str(path))}"
        )
    name = f"_rlr_peft_reward_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # as of every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        with loading_user_code(f"reward file '{path}'", "failed while it was imported:"):
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    try:
        with loading_user_code(f"reward module '{name}'", "failed while it was imported:"):
            return importlib.import_module(name)
    except RewardError as error:
        cause = error.__cause__
        if not isinstance(cause, ModuleNotFoundError):
            raise
    if cause.name is not None and (name == cause.name or name.startswith(f"{cause.name}.")):
        raise RewardError(
            f"reward module '{name}' was not found (no module '{cause.name}'); install its package, put its folder "
            "on PYTHONPATH, or give the file itself as `path/to/file.py:callable`"
        )
    raise RewardError(f"reward module '{name}' needs '{cause.name}', which is not installed")


def _check_returns(name: str, function: Callable[..., Any]) -> None:
    for called in (function, type(function).__call__):
        yields = inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called)
        if yields or inspect.iscoroutinefunction(called):
            got = "one with `yield`" if yields else "an `async` one"
            raise RewardError(f"reward '{name}': expected a function that returns scores, got {got}")


def _passes_metadata(name: str, function: Callable[..., Any]) -> str:
    """How the callable wants its metadata: "positional", "keyword" or "no"."""
    # The signature of a module's `__call__` says nothing; its `forward` does.
    inspected = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = list(inspect.signature(inspected).parameters.values())
    except (TypeError, ValueError):  # some builtins and extension functions have none
        return "no"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = [p for p in positional if p.default is p.empty]
    other_required = [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "metadata"
    ]
    if len(required) > 3 or other_required or (len(positional) < 2 and not takes_any_number):
        raise RewardError(
            f"reward '{name}': expected a callable taking {EXPECTED_ARGUMENTS}, got {inspect.signature(inspected)}"
        )
    if any(p.kind is p.KEYWORD_ONLY and p.name == "metadata" for p in parameters):
        return "keyword"
    if len(positional) > 2:
        third = positional[2]
        if third.default is third.empty or third.name == "metadata":
            return "positional"
        return "keyword" if any(p.name == "metadata" for p in positional[3:]) else "no"
    return "positional" if takes_any_number else "no"


NOT_THEIRS = (str(Path(__file__).parents[1]), str(importlib.__file__), "<frozen importlib")
OURS = "rlr_peft"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Setting:
    """A piece of global state, which ``write`` sets to what ``read`` returned; later writes do not change that."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


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
    _Setting(
        "torch's default device",
        torch.get_default_device,
        # None and not "cpu", which would slow down every call into torch.
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
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
