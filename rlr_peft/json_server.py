"""Asking a server in JSON: what is tried again, how long and how much is waited for, and what messages say of it."""

import json
import logging
import reprlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from urllib3 import Retry
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.util import make_headers, parse_url

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset([429, *range(500, 600)])
MAX_BACKOFF_SECONDS = 60
MAX_RETRY_AFTER_SECONDS = 300
CONNECT_TIMEOUT_SECONDS = 10
LOOK_SECONDS = 10
MAX_ANSWER_BYTES = 16 * 2**20
MAX_BODY_IN_MESSAGE = 300
# Of malformed headers it prints the address, whatever is secret in it, and a traceback; it goes on without them.
logging.getLogger("urllib3.connection").addFilter(lambda record: "Failed to parse headers" not in str(record.msg))
# No connection, a time-out, a broken connection, or no HTTP.
_NO_ANSWER = (HTTPError, HTTPException, OSError)


class ServerError(Exception):
    """A refusal, or no JSON; the message goes on from the server's name: `answered 404 Not Found: ...`."""


class NoAnswerError(ServerError):
    """No answer at all: `gave no answer in 3 tries ...`."""


@dataclass(frozen=True)
class _Answer:
    """Status line, body, and the `Retry-After` of an answer."""

    status: int
    reason: str
    body: bytes
    retry_after: str | None


class JsonServer:
    """A server that is asked again on connection errors, timeouts, 429 and 5xx; that must change nothing there.

    Proxies set in the environment are not used, and redirects are not followed, so that user name, password and headers
    go to no other host. It asks one question at a time, over one connection that stays open.

    Args:
        url: where to POST. A user name and password in it are sent as basic authentication.
        timeout: seconds for one try as a whole: to connect, to send, and until the answer's last byte.
        retries: further tries after the first.
        backoff: half of the seconds before the second retry, which double each time, up to a minute; the first retry
            does not wait. A longer `Retry-After` is honoured up to `MAX_RETRY_AFTER_SECONDS`.
        headers: sent with every request, such as a bearer token.

    Attributes:
        name: host, port and path: no user name, password or query, which may be secret.

    Raises:
        ValueError: not an http(s) URL with a host.
    """

    def __init__(
        self, url: str, timeout: float, retries: int, backoff: float, headers: Mapping[str, str] | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://HOST:PORT/PATH or https://HOST/PATH")
        self.name = f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path.rstrip('/')}"
        # The client itself leaves the user name and password of an address out.
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
        basic = {} if user is None else {"Authorization": make_headers(basic_auth=user)["authorization"]}
        self._headers = {"Content-Type": "application/json", **basic, **(headers or {})}
        self._target = parse_url(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()).request_uri
        self._secrets = [
            *(parts.query, parts.password, unquote(parts.password or "")),
            *(value for _, value in parse_qsl(parts.query) if len(value) > 3),
            *(value.rpartition(" ")[2] for name, value in self._headers.items() if name == "Authorization"),
        ]
        connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = connection(parts.hostname, parts.port)
        self._timeout = timeout
        self._tries = retries + 1
        self._backoff = backoff

    def ask(self, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers to a POST.

        Raises:
            NoAnswerError: no answer after all tries.
            ServerError: another status than 200, no JSON, a key twice in an object, or more than `MAX_ANSWER_BYTES`.
            TypeError: `body` is none that JSON can hold.
        """
        data, tried = json.dumps(body).encode(), 0
        while True:
            tried += 1
            again = tried < self._tries
            try:
                answer = self._exchange("POST", data, self._timeout)
            except _NO_ANSWER as error:
                problem, retry_after = f"gave no answer ({_reason(error)})", None
                if not again:
                    raise NoAnswerError(
                        f"gave no answer in {self._tries} tries of {self._timeout:g} s each: {_reason(error)}"
                    ) from None
            else:
                if answer.status == 200:
                    return self._parsed(answer)
                problem = f"answered {answer.status} {self._without_secrets(answer.reason)}"
                retry_after = answer.retry_after
                if answer.status not in RETRIED_STATUSES:
                    raise ServerError(f"{problem}: {self._said(answer)}")
                if not again:
                    raise ServerError(f"{problem} after {self._tries} tries: {self._said(answer)}")
            self._wait(tried, problem, retry_after)

    def look(self) -> Any:
        """The JSON that the server answers to a GET, in one try of a few seconds; None if it answers none."""
        try:
            answer = self._exchange("GET", None, min(self._timeout, LOOK_SECONDS))
            return self._parsed(answer) if answer.status == 200 else None
        except (ServerError, *_NO_ANSWER):
            return None

    def _exchange(self, method: str, data: bytes | None, timeout: float) -> _Answer:
        """One try of so many seconds.

        A socket's own time limit starts again with every byte that comes, and http.client reads on through any number
        of interim answers: so the connection is shut when the time of the whole exchange is over.
        """
        connection, end = self._connection, time.monotonic() + timeout
        is_over = threading.Event()
        alarm: threading.Timer | None = None
        try:
            if not connection.is_connected:  # not yet, or the server has closed it in the meantime
                connection.close()
                connection.timeout = min(CONNECT_TIMEOUT_SECONDS, timeout)
                connection.connect()
            left = max(end - time.monotonic(), 0.001)
            alarm = threading.Timer(left, _shut, [connection.sock, is_over])
            alarm.daemon = True
            alarm.start()
            connection.timeout = left
            with suppress(BrokenPipeError, ConnectionResetError):  # who refuses a long question may not read all of it
                connection.request(method, self._target, body=data, headers=self._headers, preload_content=False)
            response = connection.getresponse()
            body = response.read(MAX_ANSWER_BYTES + 1)
            if is_over.is_set():  # an answer without a length ends wherever the connection does
                raise TimeoutError
            if not body and "Content-Length" not in response.headers:
                raise HTTPException("the connection ended before the answer")
        except BaseException as error:
            connection.close()
            if is_over.is_set() and isinstance(error, _NO_ANSWER):
                raise TimeoutError(f"the answer was not whole after {timeout:g} s") from None
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
        if len(body) > MAX_ANSWER_BYTES:
            connection.close()
            raise ServerError(f"answered more than {MAX_ANSWER_BYTES // 2**20} MiB, which is no answer to the question")
        return _Answer(response.status, response.reason or "", body, response.headers.get("Retry-After"))

    def _parsed(self, answer: _Answer) -> Any:
        try:
            return json.loads(answer.body, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError):
            raise ServerError(f"answered no JSON but {self._said(answer)}") from None

    def shown(self, answer: Any) -> str:
        """As much of an answer as a message can show, however deep or long it is."""
        return _shortened(self._without_secrets(_representation.repr(answer)))

    def _said(self, answer: _Answer) -> str:
        return _shortened(self._without_secrets(answer.body.decode(errors="replace").strip())) or "an empty body"

    def _without_secrets(self, text: str) -> str:
        """Without those of the address and the headers, which a server may repeat."""
        for secret in filter(None, self._secrets):
            text = text.replace(secret, "***")
        return text

    def _wait(self, tried: int, problem: str, retry_after: str | None) -> None:
        """Waits before the next try, and says for what."""
        backoff = min(MAX_BACKOFF_SECONDS, self._backoff * 2.0 ** min(tried - 1, 20)) if tried > 1 else 0.0
        told = _seconds(retry_after)
        seconds = max(backoff, min(told, MAX_RETRY_AFTER_SECONDS))
        asked = ""
        if retry_after is not None:
            asked = f" with Retry-After {_shortened(retry_after)!r}"
            if told > MAX_RETRY_AFTER_SECONDS:
                asked += f", which is cut to {MAX_RETRY_AFTER_SECONDS} s"
        when = f"in {seconds:.3g} s" if seconds else "at once"
        logger.warning(
            "%s %s%s: asking again %s (try %d of %d).", self.name, problem, asked, when, tried + 1, self._tries
        )
        time.sleep(seconds)


def _shortened(text: str) -> str:
    """As much of a text as a message can show."""
    return text if len(text) <= MAX_BODY_IN_MESSAGE else text[:MAX_BODY_IN_MESSAGE] + "..."


_representation = reprlib.Repr()
_representation.maxstring = MAX_BODY_IN_MESSAGE


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ServerError(
            f"answered an object with the key {_shortened(twice)!r} twice, so that its value is not known"
        )
    return found


def _shut(connection: socket.socket, is_over: threading.Event) -> None:
    is_over.set()
    with suppress(OSError):  # it has ended by itself
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS has its own, which is not for another thread


def _seconds(retry_after: str | None) -> float:
    """Of a `Retry-After`, which may be a number or a date; 0 for none, and for nonsense."""
    if retry_after is None:
        return 0.0
    try:
        return Retry().parse_retry_after(retry_after)
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def _reason(error: Exception) -> str:
    """The error without the addresses of objects and the address that was asked."""
    return f"{type(error).__name__}: {_shortened(str(error).rpartition('>: ')[2])}"
