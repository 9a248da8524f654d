"""A reference server of a reward, over the standard library's HTTP server: one scoring at a time, JSON only.

What anyone may make it hold or wait for is limited: the pixels and bytes of a request, the bytes of all requests that
wait, the time in which a request must arrive, and the connections. Bodies are parsed and images decoded one request at
a time, so that memory does not grow with the number of clients.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Reward, Scored, join_scored, measure_images, refuse_latents
from rlr_peft.rewards.remote import TooLargeError, WireError, parse_body, read_request

logger = logging.getLogger(__name__)

IDLE_SECONDS = 60  # a connection without a request is closed after so long
RETRY_AFTER_SECONDS = 2
MAX_CONNECTIONS = 256
PIECE_BYTES = 256 * 2**10
# A PNG of noise has 3 bytes a pixel, and a third more as base64.
BODY_BYTES_OF_PIXEL, BODY_BYTES_OF_TEXT = 5, 4 * 2**20


@dataclass(frozen=True)
class ServerLimits:
    """What clients may ask for.

    Attributes:
        max_pixels: of all images of a request together.
        max_waiting_bytes: of all requests that arrive, wait or are scored, together.
        request_timeout: seconds in which a request must have arrived whole.
    """

    max_pixels: int = 70_000_000
    max_waiting_bytes: int = 512_000_000
    request_timeout: float = 60.0

    @property
    def max_body_bytes(self) -> int:
        """Of one request: as many as `max_pixels` of noise need."""
        return min(BODY_BYTES_OF_PIXEL * self.max_pixels + BODY_BYTES_OF_TEXT, self.max_waiting_bytes)


class BusyError(WireError):
    """The same request may succeed in a while."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class LengthRequiredError(WireError):
    """A request that does not say how long it is."""

    status = HTTPStatus.LENGTH_REQUIRED


class RewardServer(ThreadingHTTPServer):
    """Answers `POST /` with scores and `GET /` with the reward's name and version.

    There is no authentication: bind it to this machine, or to a network that you trust.

    Args:
        reward: scores; images are moved to its device by itself or by `device`.
        host, port: where to listen; port 0 takes a free one.
        device: where images are put before scoring.
        version: stated in every answer; another one where scores may differ.

    Raises:
        RewardError: a reward of whole videos; only images travel.
    """

    daemon_threads = True
    request_queue_size = 128  # processes of a large run connect at the same moment

    def __init__(
        self,
        reward: Reward,
        host: str,
        port: int,
        device: str | torch.device = "cpu",
        version: str | None = None,
        limits: ServerLimits | None = None,
    ) -> None:
        if reward.takes_video:
            raise RewardError(
                f"reward '{reward.name}' judges whole videos, but only images travel to a server: give it to "
                "--reward_fn itself"
            )
        refuse_latents(reward, "a server gets")
        super().__init__((host, port), _Handler)
        self.reward = reward
        self.device = device
        self.limits = limits or ServerLimits()
        self.stated = {"reward": reward.name} | ({} if version is None else {"version": version})
        self._scoring = threading.Lock()
        self._counts = threading.Lock()
        self._waiting_bytes = 0
        self._open = 0
        self._awaited: dict[socket.socket, None] = {}  # whose request has not arrived whole, the oldest first

    @property
    def url(self) -> str:
        """What to give to `--reward_fn`."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}/"

    def score(self, body: bytearray) -> dict[str, Any]:
        """The answer to a request; its body is emptied as soon as it is parsed.

        Raises:
            WireError: the request is malformed, or asks for too much.
            RewardError: the reward failed or gave bad scores.
        """
        with self._scoring:
            images, prompts, metadata = read_request(parse_body(body), self.limits.max_pixels)
            parts, order = [], []
            for rows in _by_size(images):
                pixels = torch.stack([images[row] for row in rows]).to(self.device).float().div_(255)
                parts.append(
                    measure_images(self.reward, pixels, [prompts[i] for i in rows], [metadata[i] for i in rows])
                )
                order += rows
        return _answer(join_scored(parts), order) | self.stated

    def hold(self, num_bytes: int) -> None:
        """Counts bytes that are to be held; a negative number gives them back.

        Bytes count as they come and not as they are announced: who announces much and sends little holds little.

        Raises:
            BusyError: they are too many.
        """
        with self._counts:
            if num_bytes > 0 and self._waiting_bytes + num_bytes > self.limits.max_waiting_bytes:
                raise BusyError(
                    f"requests of {self.limits.max_waiting_bytes / 1e6:.0f} MB are waiting, which is as much as this "
                    f"server holds; ask again in {RETRY_AFTER_SECONDS} s, or start it with a higher "
                    "--max_waiting_megabytes"
                )
            self._waiting_bytes += num_bytes

    def process_request(self, request: Any, client_address: Any) -> None:
        """Of too many connections the one is closed that has kept the server waiting for the longest; or the new one,
        if all others have asked something."""
        with self._counts:
            self._open += 1
            crowded = self._open > MAX_CONNECTIONS
            closed = next(iter(self._awaited), request)
            if crowded:
                self._awaited.pop(closed, None)
        if crowded:
            with suppress(OSError):  # it has ended by itself
                closed.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self.has_arrived(request)
        with self._counts:
            self._open -= 1
        super().close_request(request)

    def awaits(self, connection: socket.socket) -> None:
        """A request is to come over it."""
        with self._counts:
            self._awaited[connection] = None

    def has_arrived(self, connection: socket.socket) -> None:
        """Nothing more is to come over it for now."""
        with self._counts:
            self._awaited.pop(connection, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's affair; anything else is an error of this program."""
        lost = isinstance(sys.exception(), OSError)
        logger.warning("%s: the connection broke", client_address[0], exc_info=not lost)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self._arriving = _Arriving(self.connection)
        self._reader = io.BufferedReader(self._arriving, PIECE_BYTES)
        self.rfile = self._reader

    def handle_one_request(self) -> None:
        self.server.awaits(self.connection)
        self._arriving.expect_within(IDLE_SECONDS)
        try:
            self._reader.peek(1)
        except TimeoutError:
            self.close_connection = True
            return
        self._arriving.expect_within(self.server.limits.request_timeout)
        super().handle_one_request()

    def do_GET(self) -> None:
        self.server.has_arrived(self.connection)
        self._send(HTTPStatus.OK, self.server.stated)

    def do_POST(self) -> None:
        body, held, refused = bytearray(), 0, True
        try:
            for piece in self._pieces():
                self.server.hold(len(piece))
                held += len(piece)
                body += piece
            refused = False
            self.server.has_arrived(self.connection)
            status, answer = self._score(body)
        except WireError as error:
            status, answer = error.status, {"error": str(error)}
        except TimeoutError:
            status = HTTPStatus.REQUEST_TIMEOUT
            answer = {
                "error": f"the request had not arrived after {self.server.limits.request_timeout:g} s; send fewer "
                "images at once (--reward_server_batch_size), or start the server with a higher --request_timeout"
            }
        finally:
            body.clear()
            self.server.hold(-held)
        self.close_connection |= refused
        self._send(status, answer)
        if refused:
            self._let_it_end()

    def _pieces(self) -> Iterator[bytes]:
        """Of the body, as they come."""
        announced = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", announced):
            raise LengthRequiredError("expected a Content-Length")
        left, most = int(announced), self.server.limits.max_body_bytes
        if left > most:
            raise TooLargeError(
                f"expected a request of at most {most / 1e6:.0f} MB, got {left / 1e6:.1f} MB; send fewer images at "
                "once (--reward_server_batch_size), or start the server with a higher --max_megapixels or "
                "--max_waiting_megabytes"
            )
        while left:
            piece = self.rfile.read1(min(left, PIECE_BYTES))
            if not piece:
                raise ConnectionAbortedError("the client has left in the middle of its request")
            left -= len(piece)
            yield piece

    def _score(self, body: bytearray) -> tuple[HTTPStatus, dict[str, Any]]:
        try:
            return HTTPStatus.OK, self.server.score(body)
        except WireError as error:
            return error.status, {"error": str(error)}
        except RewardError as error:
            # The same images would fail again: not a 5xx, which clients retry.
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}
        except Exception as error:
            logger.exception("Scoring failed")
            return HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"}

    def _let_it_end(self) -> None:
        """Throws away what still comes of a request that was not read to its end, for a while.

        A connection that is closed with unread bytes is reset, and its answer may be lost.
        """
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self._arriving.expect_within(self.server.limits.request_timeout)
            while self.rfile.read1(PIECE_BYTES):
                pass

    def _send(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.connection.settimeout(IDLE_SECONDS)
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status is HTTPStatus.SERVICE_UNAVAILABLE:
                self.send_header("Retry-After", str(RETRY_AFTER_SECONDS))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            # The client has stopped waiting, or does not listen; nobody is left to tell.
            logger.warning("%s left before its answer; it may need a longer timeout", self.address_string())
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %s", self.address_string(), format % args)


class _Arriving(io.RawIOBase):
    """The bytes of a connection until a deadline.

    The limit of a socket alone starts again with every byte, so that a client that drips would be waited for for ever.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = 0.0

    def expect_within(self, seconds: float) -> None:
        """Sets the deadline: so many seconds from now."""
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


def _by_size(images: list[torch.Tensor]) -> list[list[int]]:
    """Rows of images of the same size, which can be scored together."""
    rows: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    return list(rows.values())


def _answer(scored: Scored, order: list[int]) -> dict[str, Any]:
    """Of scores whose images stand in the request at these places.

    JSON has neither NaN nor infinity: info that a sample lacks is null.
    """
    positions = sorted(range(len(order)), key=order.__getitem__)
    info = {
        name: [value if math.isfinite(value) else None for value in values[positions].tolist()]
        for name, values in scored.logged.items()
    }
    return {"rewards": scored.scores.cpu()[positions].tolist()} | ({"info": info} if info else {})
