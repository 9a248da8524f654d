"""A reward behind `http(s)://`: images go out as PNG in JSON, scores come back. Nothing is ever pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from rlr_peft.rewards.errors import RewardError
from rlr_peft.rewards.info import Info, info_of, join_info
from rlr_peft.rewards.scores import check_scores
from rlr_peft.rewards.wire import request_body

RETRIED_STATUSES = frozenset([429, *range(500, 600)])
MAX_BACKOFF_SECONDS = 60
CONNECT_TIMEOUT_SECONDS = 10
MAX_BODY_IN_MESSAGE = 300


@dataclass(frozen=True)
class RemoteSettings:
    """How a server is asked.

    Attributes:
        timeout: seconds until an answer must have come.
        retries: further tries after the first, on connection errors, timeouts, 429 and 5xx.
        backoff: half of the seconds before the second retry, which double each time, up to a minute; the first retry
            does not wait. `Retry-After` is honoured.
        batch_size: images of one request.
    """

    timeout: float = 120.0
    retries: int = 5
    backoff: float = 1.0
    batch_size: int = 16


class RemoteReward:
    """Asks a server that speaks the protocol of `docs/rewards.md`, such as `rlr-peft serve-reward`.

    Args:
        url: where to POST.
        settings: how to ask.

    Raises:
        RewardError: the URL names no host.
    """

    differentiable = False

    def __init__(self, url: str, settings: RemoteSettings | None = None) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise RewardError(f"reward server '{url}': expected http://HOST:PORT/PATH")
        # No user name, password or query: they may be secret, and names go into the model card.
        self.name = f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path.rstrip('/')}"
        self._url = url
        self._settings = settings or RemoteSettings()
        self._pool = PoolManager(
            retries=Retry(
                total=self._settings.retries,
                redirect=0,
                other=0,
                allowed_methods=None,  # asking for scores again changes nothing, although it is a POST
                status_forcelist=RETRIED_STATUSES,
                backoff_factor=self._settings.backoff,
                backoff_max=MAX_BACKOFF_SECONDS,
                raise_on_status=False,
                raise_on_redirect=False,
            ),
            timeout=Timeout(connect=min(CONNECT_TIMEOUT_SECONDS, self._settings.timeout), read=self._settings.timeout),
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Tensor, Info]:
        """(B,) float32 on the images' device, and the server's info.

        Raises:
            RewardError: no answer after all retries, a refusal (4xx), or an answer that is not one finite number per
                image.
        """
        scores: list[Tensor] = []
        infos: list[tuple[Info, int]] = []
        for start in range(0, len(prompts), self._settings.batch_size):
            part = slice(start, start + self._settings.batch_size)
            answer = self._ask(request_body(images[part], prompts[part], metadata[part]))
            if "rewards" not in answer:
                raise RewardError(
                    f"{self._where()}: expected a JSON object with `rewards`, got {_shortened(json.dumps(answer))}"
                )
            returned = (answer["rewards"], answer.get("info"))
            scores.append(check_scores(self.name, returned, prompts[part]))
            infos.append((info_of(returned, len(prompts[part])), len(prompts[part])))
        return torch.cat(scores).to(images.device), join_info(infos)

    def _ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = self._pool.request("POST", self._url, json=body)
        except HTTPError as error:
            tries = self._settings.retries + 1
            raise RewardError(
                f"{self._where()} gave no answer in {tries} tries of {self._settings.timeout:g} s each: "
                f"{_reason(error)}; check that it runs and is reachable, or raise --reward_server_timeout"
            ) from None
        if response.status != 200:
            again = f" after {self._settings.retries + 1} tries" if response.status in RETRIED_STATUSES else ""
            raise RewardError(
                f"{self._where()} answered {response.status} {response.reason or ''}{again}: {_said(response)}"
            )
        try:
            answer = response.json()
        except ValueError:
            raise RewardError(f"{self._where()}: expected JSON, got {_said(response)}") from None
        if not isinstance(answer, dict):
            raise RewardError(
                f"{self._where()}: expected a JSON object with `rewards`, got {_shortened(json.dumps(answer))}"
            )
        return answer

    def _where(self) -> str:
        return f"reward server '{self.name}'"


def _said(response: BaseHTTPResponse) -> str:
    return _shortened(response.data.decode(errors="replace").strip()) or "an empty body"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_BODY_IN_MESSAGE else text[:MAX_BODY_IN_MESSAGE] + "..."


def _reason(error: HTTPError) -> str:
    """What lies behind urllib3's own summary, without its objects' addresses."""
    cause = getattr(error, "reason", None) or error
    return f"{type(cause).__name__}: {str(cause).rpartition('>: ')[2]}"
