"""Asking a server by POST, in JSON: what is tried again, and what may be said of it in messages."""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError
from urllib3.util import make_headers

from rlr_peft.redaction import redacted, redacted_address

RETRIED_STATUSES = frozenset([429, *range(500, 600)])
MAX_BACKOFF_SECONDS = 60
CONNECT_TIMEOUT_SECONDS = 10
MAX_BODY_IN_MESSAGE = 300
SHORTEST_SECRET = 4  # characters
BAD_PORT = "a port that is no number from 1 to 65535"


class ServerError(Exception):
    """A refusal, or no JSON; the message goes on from the server's name: `answered 404 Not Found: ...`."""


class NoAnswerError(ServerError):
    """No answer at all: `gave no answer in 3 tries ...`."""


class JsonServer:
    """A server that is asked again on connection errors, timeouts, 429 and 5xx; that must change nothing there.

    Proxies set in the environment are not used, and redirects are not followed.

    Args:
        url: where to POST. A user name and password in it are sent as basic authentication.
        timeout: seconds until an answer must have come.
        retries: further tries after the first.
        backoff: half of the seconds before the second retry, which double each time, up to a minute; the first retry
            does not wait. `Retry-After` is honoured.
        headers: sent with every request, such as a bearer token.

    Attributes:
        name: host, port and path: no user name, password or query, which may be secret.

    Raises:
        ValueError: not an http(s) URL with a host; the message does not quote it.
    """

    def __init__(
        self, url: str, timeout: float, retries: int, backoff: float, headers: Mapping[str, str] | None = None
    ) -> None:
        parts = read_address(url)
        place = f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path.rstrip('/')}"
        self.name = redacted_address(f"{parts.scheme}://{place}").partition("://")[2]
        # The client itself leaves the user name and password of an address out.
        name, password = unquote(parts.username or ""), unquote(parts.password or "")
        login = make_headers(basic_auth=f"{name}:{password}")["authorization"]
        basic = {"Authorization": login} if parts.username or parts.password else {}
        # A server may repeat them in its answer. Of shorter ones every text is full.
        known = [name, password, *filter(None, (parts.username, parts.password)), *_values_of(parts.query)]
        known += [value.partition(" ")[2] or value for value in (headers or {}).values()]
        self._secrets = sorted({one for one in known if len(one) >= SHORTEST_SECRET}, key=len, reverse=True)
        self._headers = {"Content-Type": "application/json", **basic, **(headers or {})}
        self._url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._timeout = timeout
        self._tries = retries + 1
        self._pool = PoolManager(
            retries=Retry(
                total=retries,
                redirect=0,
                other=0,
                allowed_methods=None,  # asking again changes nothing, although it is a POST
                status_forcelist=RETRIED_STATUSES,
                backoff_factor=backoff,
                backoff_max=MAX_BACKOFF_SECONDS,
                raise_on_status=False,
                raise_on_redirect=False,
            ),
            timeout=Timeout(connect=min(CONNECT_TIMEOUT_SECONDS, timeout), read=timeout),
        )

    def ask(self, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers.

        Raises:
            NoAnswerError: no answer after all tries.
            ServerError: another status than 200, or no JSON.
            TypeError: `body` is none that JSON can hold.
        """
        data = json.dumps(body).encode()
        try:
            response = self._pool.request("POST", self._url, body=data, headers=self._headers)
        except HTTPError as error:
            reason = redacted(_reason(error), self._secrets)
            raise NoAnswerError(
                f"gave no answer in {self._tries} tries of {self._timeout:g} s each: {reason}"
            ) from None
        if response.status != 200:
            again = f" after {self._tries} tries" if response.status in RETRIED_STATUSES else ""
            raise ServerError(f"answered {response.status} {response.reason or ''}{again}: {self._said(response)}")
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise ServerError(f"answered no JSON but {self._said(response)}") from None

    def _said(self, response: BaseHTTPResponse) -> str:
        said = redacted(response.data.decode(errors="replace").strip(), self._secrets)
        return shortened(said) or "an empty body"


def read_address(url: str) -> SplitResult:
    """The parts of an http(s) address.

    Raises:
        ValueError: it is none; the message says what was expected and does not quote it, as it may hold a password.
    """
    problem = None
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            problem = "another scheme"
        elif not parts.hostname:
            problem = "no host"
        elif re.search(r"\s", parts.netloc.rpartition("@")[2]):
            problem = "a host with a space in it"
        elif parts.port == 0:
            problem = BAD_PORT
    except ValueError as error:
        problem = BAD_PORT if str(error).startswith("Port") else "a host that cannot be read"
    if problem is not None:
        raise ValueError(
            f"expected http://HOST:PORT/PATH or https://HOST/PATH, got {problem}; correct it, and write %2F, %3F and "
            "%23 for /, ? and # in a password"
        )
    return parts


def shortened(text: str) -> str:
    """As much of a text as a message can show."""
    return text if len(text) <= MAX_BODY_IN_MESSAGE else text[:MAX_BODY_IN_MESSAGE] + "..."


def _values_of(query: str) -> list[str]:
    return [value for part in query.split("&") for value in (part.partition("=")[2], unquote(part.partition("=")[2]))]


def _reason(error: HTTPError) -> str:
    """What lies behind urllib3's own summary, without its objects' addresses and the address that was asked."""
    cause = getattr(error, "reason", None) or error
    return f"{type(cause).__name__}: {str(cause).rpartition('>: ')[2]}"
