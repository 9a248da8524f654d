"""The Hub's client with what it lacks: a time limit, further tries, and errors in plain words."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, ModelInfo, constants, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    parse_ratelimit_headers,
)
from huggingface_hub.utils._http import default_client_factory
from urllib3 import Retry

from rlr_peft.errors import UserError

logger = logging.getLogger(__name__)

# The client itself waits for ever. The Hub may take a minute to check a commit.
# Seconds of silence; an answer that comes byte by byte has no limit, as an upload of gigabytes may take hours.
TIMEOUT_SECONDS = 120.0
TIMEOUT = httpx2.Timeout(TIMEOUT_SECONDS, connect=10.0)
TRIES = 5
BACKOFF_SECONDS = 1.0  # half of the wait before the third try; it doubles each time
# Of a `Retry-After`, or until the Hub's window of five minutes ends; who is told to wait longer gets the error instead.
MAX_WAIT_SECONDS = 301.0
PASSING_STATUSES = frozenset([408, 429, 500, 502, 503, 504])
PASSING_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
# What the client raises: HTTP errors of its own and of httpx, disk and Xet errors, wrapped uploads, refused metadata.
FAILURES = (OSError, RuntimeError, ValueError, httpx2.HTTPError)

Answer = TypeVar("Answer")


class HubError(UserError, RuntimeError):
    """The Hub cannot be used as asked for, or something was not published; the message may have several lines."""

    def __init__(self, message: str) -> None:
        super().__init__(*message.splitlines())


class UncheckedError(HubError):
    """The Hub accepted a commit, but a file of it could not be downloaded to compare it; another try may do."""


class IncompleteError(HubError):
    """The Hub accepted a commit, but lacks a file of it or holds another one; the same push would send nothing.

    Attributes:
        name: of the file, in the repository.
        commit: its id.
    """

    def __init__(self, message: str, name: str, commit: str) -> None:
        super().__init__(message)
        self.name, self.commit = name, commit


def hub_api(token: str | None) -> HfApi:
    """The client, with a time limit for every request of this process.

    Args:
        token: of the user; None takes that of `HF_TOKEN` or `hf auth login`.
    """
    _limit_time()
    return HfApi(token=token)


def patiently(call: Callable[[], Answer]) -> Answer:
    """Calls again what failed for a passing reason: no connection, a time-out, 429 or 5xx.

    `Retry-After` is honoured, and with 429 the Hub's own `RateLimit`, which tells when its window ends.

    The client does so by itself for uploads and downloads, but neither for `whoami`, `create_repo`, `model_info` and
    the check of a card's metadata, nor for the commit. `call` must change nothing when it is repeated.
    """
    retry = Retry(total=TRIES - 1, backoff_factor=BACKOFF_SECONDS, backoff_max=MAX_WAIT_SECONDS)
    while True:
        try:
            return call()
        except (HfHubHTTPError, *PASSING_ERRORS) as error:
            told = _retry_after(error, retry)
            if not retry.total or not is_passing(error) or told > MAX_WAIT_SECONDS:
                raise
            retry = retry.increment(error=error)
            wait = max(told, retry.get_backoff_time())
            logger.warning("%s Trying again in %.0f s.", in_words(error), wait)
            time.sleep(wait)


def model_info(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo:
    """What the Hub knows of a repository, asked for patiently.

    Of the client's calls that are used here this is the one that puts no time limit in the place of ours.
    """
    return patiently(lambda: api.model_info(repo_id, revision=revision, timeout=TIMEOUT_SECONDS))


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in PASSING_STATUSES
    return isinstance(error, PASSING_ERRORS)


def is_missing(error: Exception) -> bool:
    """Whether the Hub, which knows the repository, says that what is asked for is not there."""
    if isinstance(error, RepositoryNotFoundError) or not isinstance(error, HfHubHTTPError) or error.response is None:
        return False
    return error.response.status_code in (404, 410)


def in_words(error: BaseException) -> str:
    """One sentence on what went wrong, for a person; it never holds a token."""
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no access token."
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub's offline mode is on (HF_HUB_OFFLINE)."
    if isinstance(error, RepositoryNotFoundError):
        return "There is no such repository, or the token may not see it."
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _status_in_words(error.response.status_code, error)
    if isinstance(error, httpx2.TransportError):
        kind, said = type(error).__name__, f": {error}" if str(error) else ""
        return f"The Hub at {constants.ENDPOINT} cannot be reached ({kind}{said})."
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client's wrapper of a failed upload
        return f"{error} {in_words(error.__cause__)}"
    return f"{type(error).__name__}: {error}"


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """The client's bars would be torn by those of training."""
    were_on = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            enable_progress_bars()


@cache
def _limit_time() -> None:
    def client() -> httpx2.Client:
        made = default_client_factory()  # with the hook for offline mode and request ids
        made.timeout = TIMEOUT
        return made

    set_client_factory(client)


def _retry_after(error: Exception, retry: Retry) -> float:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is None:
        return 0.0
    told, limit = response.headers.get("Retry-After"), parse_ratelimit_headers(response.headers)
    if told is None:
        return 0.0 if limit is None or limit.remaining > 0 else limit.reset_in_seconds + 1.0
    try:
        return float(retry.parse_retry_after(told))
    except Exception:  # urllib3's InvalidHeader: a proxy's nonsense is as good as no header
        return 0.0


def _status_in_words(status: int, error: HfHubHTTPError) -> str:
    said = error.server_message or ""
    meaning = {
        401: "refused the token",
        403: "says that the token may not do this",
        413: "says that the upload is too large",
        429: "was asked too often",
        507: "has no space left",
    }.get(status, "has trouble of its own" if status >= 500 else "refused the request")
    return f"The Hub at {constants.ENDPOINT} {meaning} (HTTP {status}{f': {said}' if said else ''})."
