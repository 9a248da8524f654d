"""A reference server of a reward, over the standard library's HTTP server: one scoring at a time, JSON only."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rlr_peft.rewards.base import Reward, RewardError, Scored, measure_images
from rlr_peft.rewards.info import Info, join_info
from rlr_peft.rewards.wire import WireError, read_request

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 * 2**20
IDLE_SECONDS = 60  # a connection that sends nothing for so long is closed


class RewardServer(ThreadingHTTPServer):
    """Answers `POST /` with scores and `GET /` with the reward's name.

    There is no authentication: bind it to this machine, or to a network that you trust.

    Args:
        reward: scores; images are moved to its device by itself or by `device`.
        host, port: where to listen; port 0 takes a free one.
        device: where images are put before scoring.

    Raises:
        RewardError: a reward of whole videos; only images travel.
    """

    daemon_threads = True

    def __init__(self, reward: Reward, host: str, port: int, device: str | torch.device = "cpu") -> None:
        if getattr(reward, "takes_video", False):
            raise RewardError(
                f"reward '{reward.name}' judges whole videos, but only images travel to a server: give it to "
                "--reward_fn itself"
            )
        super().__init__((host, port), _Handler)
        self.reward = reward
        self.device = device
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """What to give to `--reward_fn`."""
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}/"

    def score(self, body: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            WireError: the request is malformed.
            RewardError: the reward failed or gave bad scores.
        """
        images, prompts, metadata = read_request(body)
        scores = torch.empty(len(prompts))
        infos: list[tuple[Info, int]] = []
        order: list[int] = []
        for rows in _by_size(images):
            with self.lock:
                scored = measure_images(
                    self.reward,
                    torch.stack([images[row] for row in rows]).to(self.device),
                    [prompts[row] for row in rows],
                    [metadata[row] for row in rows],
                )
            scores[rows] = scored.scores.cpu()
            infos.append((scored.info, len(rows)))
            order += rows
        return _answer(Scored(scores, join_info(infos)), order)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._send(HTTPStatus.OK, {"reward": self.server.reward.name})

    def do_POST(self) -> None:
        try:
            answer = self.server.score(self._body())
        except WireError as error:
            self._send(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except RewardError as error:
            # The same images would fail again: not a 5xx, which clients retry.
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)})
        except Exception as error:
            logger.exception("Scoring failed")
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"})
        else:
            self._send(HTTPStatus.OK, answer)

    def _body(self) -> Any:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            self.close_connection = True
            raise WireError("expected a Content-Length") from None
        if not 0 <= length <= MAX_BODY_BYTES:
            self.close_connection = True
            raise WireError(f"expected at most {MAX_BODY_BYTES} bytes, got {length}; send fewer images at once")
        try:
            return json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise WireError("expected JSON") from None

    def _send(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            # The client has stopped waiting; nobody is left to tell.
            logger.warning("%s left before its answer; it may need a longer timeout", self.address_string())
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %s", self.address_string(), format % args)


def _by_size(images: list[torch.Tensor]) -> Iterator[list[int]]:
    """Rows of images of the same size, which can be scored together."""
    rows: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    yield from rows.values()


def _answer(scored: Scored, order: list[int]) -> dict[str, Any]:
    """JSON has neither NaN nor infinity: info that a sample lacks is null."""
    positions = sorted(range(len(order)), key=order.__getitem__)
    info = {
        name: [value if math.isfinite(value) else None for value in values[positions].tolist()]
        for name, values in scored.info.items()
    }
    answer: dict[str, Any] = {"rewards": scored.scores.tolist()}
    return answer | ({"info": info} if info else {})
