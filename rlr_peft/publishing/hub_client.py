"""The Hub's client with what it lacks (a time limit, further tries, errors in plain words), and the check of access.

May this token write to that repository? That is asked before training; nothing but an empty repository is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, constants, get_token, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    parse_ratelimit_headers,
    validate_repo_id,
)
from huggingface_hub.utils._http import default_client_factory
from urllib3 import Retry

from rlr_peft.errors import UserError
from rlr_peft.files import WEIGHT_NAME, stays_inside
from rlr_peft.redaction import redacted_address

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


TOKEN_PAGE = "https://huggingface.co/settings/tokens"
# What a repository holds at its top level if it is some other model.
FOREIGN_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".gguf", ".pt", ".pth")
FOREIGN_NAMES = ("model_index.json", "config.json", "adapter_config.json")


@dataclass(frozen=True)
class Destination:
    """Where a run is published; the token may write there.

    Attributes:
        api: the client, with the token.
        repo_id: `owner/name`.
        revision: the branch.
        token: given by the user; None where the client finds its own.
    """

    api: HfApi = field(repr=False)
    repo_id: str
    revision: str
    token: str | None = field(repr=False, default=None)

    @property
    def url(self) -> str:
        """Of the page that shows the adapter."""
        is_main = self.revision == constants.DEFAULT_REVISION
        return redacted_address(f"{self.api.endpoint}/{self.repo_id}") if is_main else self.tree(self.revision)

    def tree(self, revision: str) -> str:
        """Of the page that lists the files of a branch or commit."""
        return redacted_address(f"{self.api.endpoint}/{self.repo_id}/tree/{revision}")


def open_destination(
    repo_id: str, *, token: str | None = None, private: bool = False, revision: str | None = None
) -> Destination:
    """Checks the token and its rights, and creates the repository and the branch where they are missing.

    Args:
        repo_id: `owner/name`, or a name alone for the token's own user.
        token: None takes that of `HF_TOKEN` or `hf auth login`.
        private: create a private repository; one that exists must be private.
        revision: branch to publish on; None means main.

    Raises:
        HubError: no token, a token that the Hub refuses or that may only read, a repository of somebody else, a name
            that is taken by another model, an existing repository that is public but should be private, or no Hub.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"hub_model_id: expected `owner/name` or `name`, got {repo_id}; choose another --hub_model_id. {error}"
        ) from None
    if revision is not None and not stays_inside(revision):
        raise HubError(f"hub_revision: expected the name of a branch, got {revision!r}; choose another --hub_revision.")
    api = hub_api(token)
    try:
        me = _who_asks(api, token)
        full = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
        _check_owner(full, me)
        _create(api, full, private)
        branch = revision or constants.DEFAULT_REVISION
        if branch != constants.DEFAULT_REVISION:
            patiently(lambda: api.create_branch(full, branch=branch, exist_ok=True))
        _probe(api, full, branch)
    except (HfHubHTTPError, OfflineModeIsEnabled, *PASSING_ERRORS) as error:
        raise HubError(f"Nothing was published: {in_words(error)}") from error
    return Destination(api, full, branch, token)


def _who_asks(api: HfApi, token: str | None) -> dict[str, Any]:
    token = token or get_token()
    if token is not None and not token.isascii():
        raise HubError(
            "hub_token: expected an access token such as hf_..., got other letters than one has; copy it anew."
        )
    if token is None:
        raise HubError(
            f"Publishing needs an access token with the right to write, and there is none: make one at {TOKEN_PAGE} "
            "and give it by `hf auth login`, by the environment variable HF_TOKEN, or by --hub_token."
        )
    try:
        me: dict[str, Any] = patiently(api.whoami)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise HubError(
                f"The Hub at {api.endpoint} refused the access token: it is mistyped, expired or revoked. Make a new "
                f"one at {TOKEN_PAGE}."
            ) from error
        raise
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"The access token of {me['name']} may only read: make one with the right to write at {TOKEN_PAGE}."
        )
    return me


def _check_owner(repo_id: str, me: dict[str, Any]) -> None:
    owner = repo_id.split("/")[0]
    roles = {one["name"]: one.get("roleInOrg") for one in me.get("orgs", ())}
    if owner != me["name"] and owner not in roles:
        places = ", ".join([me["name"], *roles])
        raise HubError(
            f"The token of {me['name']} cannot write to {repo_id}: expected a repository of {places}, got one of "
            f"{owner}. Change --hub_model_id, or use a token of {owner}."
        )
    if roles.get(owner) == "read":
        raise HubError(
            f"{me['name']} may only read in the organisation {owner}, so {repo_id} cannot be written: ask its admins "
            "for the right to write, or change --hub_model_id."
        )


def _create(api: HfApi, repo_id: str, private: bool) -> None:
    patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    info = model_info(api, repo_id)
    if private and not info.private:
        raise HubError(
            f"{repo_id} exists and is public, but --hub_private_repo asks for a private one: change its visibility in "
            "its settings, or choose another --hub_model_id."
        )
    top = [one.rfilename for one in info.siblings or () if "/" not in one.rfilename]
    foreign = [
        name
        for name in top
        if name != WEIGHT_NAME and (name in FOREIGN_NAMES or PurePosixPath(name).suffix in FOREIGN_SUFFIXES)
    ]
    if foreign:
        raise HubError(
            f"The name {repo_id} is taken by another model (it holds {', '.join(sorted(foreign)[:3])}), which would be "
            "mixed with this adapter: choose another --hub_model_id."
        )


def _probe(api: HfApi, repo_id: str, branch: str) -> None:
    """Asks how a file would be uploaded, which the Hub answers only to those who may write."""
    try:
        patiently(
            lambda: api.preupload_lfs_files(repo_id, [CommitOperationAdd(".gitattributes", b"")], revision=branch)
        )
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise
        raise HubError(
            f"The access token may not write to {repo_id}: give it the right to write there at {TOKEN_PAGE}, or change "
            "--hub_model_id."
        ) from error
