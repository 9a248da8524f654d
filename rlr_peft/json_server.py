"""Asking a server in JSON: what is tried again, how long and how much is waited for, and what messages say of it."""

import json
import logging
import re
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
from urllib.parse import SplitResult, unquote, urlsplit

from urllib3 import Retry
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.util import make_headers, parse_url

from rlr_peft.redaction import redacted, redacted_address

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset([429, *range(500, 600)])
MAX_BACKOFF_SECONDS = 60
MAX_RETRY_AFTER_SECONDS = 300
CONNECT_TIMEOUT_SECONDS = 10
LOOK_SECONDS = 10
MAX_ANSWER_BYTES = 16 * 2**20
MAX_BODY_IN_MESSAGE = 300
PICKLE = b"\x80"  # the first byte since protocol 2, and of no UTF-8
SHORTEST_SECRET = 4  # characters
BAD_PORT = "a port that is no number from 1 to 65535"
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
        known += [value.partition(" ")[2] or value for value in {**basic, **(headers or {})}.values()]
        self._secrets = sorted({one for one in known if len(one) >= SHORTEST_SECRET}, key=len, reverse=True)
        self._headers = {"Content-Type": "application/json", **basic, **(headers or {})}
        self._target = parse_url(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()).request_uri
        connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = connection(str(parts.hostname), parts.port)
        self._timeout = timeout
        self._tries = retries + 1
        self._backoff = backoff
        self._asking = threading.Lock()

    def ask(self, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers to a POST.

        Raises:
            NoAnswerError: no answer after all tries.
            ServerError: another status than 200, no JSON, a key twice in an object, or more than `MAX_ANSWER_BYTES`.
            TypeError: `body` is none that JSON can hold.
        """
        data = json.dumps(body).encode()
        with self._asking:  # a run that was stopped may have left a thread that still waits for an answer
            return self._ask(data)

    def _ask(self, data: bytes) -> Any:
        tried = 0
        while True:
            tried += 1
            again = tried < self._tries
            try:
                answer = self._exchange("POST", data, self._timeout)
            except _NO_ANSWER as error:
                reason, retry_after = redacted(_reason(error), self._secrets), None
                problem = f"gave no answer ({reason})"
                if not again:
                    raise NoAnswerError(
                        f"gave no answer in {self._tries} tries of {self._timeout:g} s each: {reason}"
                    ) from None
            else:
                if answer.status == 200:
                    return self._parsed(answer)
                problem = f"answered {answer.status} {redacted(answer.reason, self._secrets)}"
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
            if answer.body.startswith(PICKLE):
                raise ServerError(
                    "answered with a pickle, which is never opened, as it can run any code; let the server answer JSON"
                ) from None
            raise ServerError(f"answered no JSON but {self._said(answer)}") from None

    def shown(self, answer: Any) -> str:
        """As much of an answer as a message can show, however deep or long it is."""
        return _shortened(redacted(_representation.repr(answer), self._secrets))

    def _said(self, answer: _Answer) -> str:
        return _shortened(redacted(answer.body.decode(errors="replace").strip(), self._secrets)) or "an empty body"

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


def _shortened(text: str) -> str:
    """As much of a text as a message can show."""
    return text if len(text) <= MAX_BODY_IN_MESSAGE else text[:MAX_BODY_IN_MESSAGE] + "..."


_representation = reprlib.Repr()
_representation.maxstring = MAX_BODY_IN_MESSAGE


def _values_of(query: str) -> list[str]:
    return [value for part in query.split("&") for value in (part.partition("=")[2], unquote(part.partition("=")[2]))]


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
