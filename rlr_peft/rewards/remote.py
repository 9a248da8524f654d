"""A reward behind `http(s)://`: images go out as PNG in JSON, scores come back. Nothing is ever pickled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlr_peft.json_server import JsonServer, NoAnswerError, ServerError
from rlr_peft.redaction import redacted_address
from rlr_peft.rewards.errors import RewardError
from rlr_peft.rewards.info import Info, info_of, join_info
from rlr_peft.rewards.scores import check_scores
from rlr_peft.rewards.wire import request_body

logger = logging.getLogger(__name__)

MAX_VERSION_LENGTH = 200


@dataclass(frozen=True)
class RemoteSettings:
    """How a server is asked.

    Attributes:
        timeout: seconds for one try as a whole, until the answer's last byte.
        retries: further tries after the first, on connection errors, timeouts, 429 and 5xx.
        backoff: half of the seconds before the second retry, which double each time, up to a minute; the first retry
            does not wait. A longer `Retry-After` is honoured up to five minutes.
        batch_size: images of one request.
    """

    timeout: float = 120.0
    retries: int = 5
    backoff: float = 1.0
    batch_size: int = 16


class RemoteReward:
    """Asks a server that speaks the protocol of `docs/rewards.md`, such as `rlr-peft serve-reward`.

    Args:
        url: where to POST; a user name and password in it are sent, and said nowhere.
        settings: how to ask.

    Attributes:
        version: what the latest answer said of the server's version; None where it said nothing. It warns when that
            changes, as scores of two versions do not compare.

    Raises:
        RewardError: not an http(s) URL with a host.
    """

    differentiable = False

    def __init__(self, url: str, settings: RemoteSettings | None = None) -> None:
        self._settings = settings or RemoteSettings()
        try:
            self._server = JsonServer(url, self._settings.timeout, self._settings.retries, self._settings.backoff)
        except ValueError as error:
            raise RewardError(f"reward server '{redacted_address(url)}': {error}") from None
        self.name = self._server.name
        self.version: str | None = None

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
            self._note_version(answer)
            scores.append(check_scores(self.name, answer["rewards"], prompts[part]))
            infos.append((info_of((scores[-1], answer.get("info")), len(prompts[part])), len(prompts[part])))
        return torch.cat(scores).to(images.device), join_info(infos)

    def ask_version(self) -> str | None:
        """What the server says of its version to a GET; None where it says nothing, or does not answer."""
        return _version_in(self._server.look())

    def _note_version(self, answer: dict[str, Any]) -> None:
        version = _version_in(answer)
        if self.version is not None and version != self.version:
            logger.warning(
                "Reward server '%s' has changed: it is of version %s now and was of %s. Its scores before and after "
                "that do not compare.",
                *(self.name, version or "an unknown one", self.version),
            )
        self.version = version

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        where = f"reward server '{self.name}'"
        try:
            answer = self._server.ask(body)
        except NoAnswerError as error:
            raise RewardError(
                f"{where} {error}; check that it runs and is reachable, or raise --reward_server_timeout"
            ) from None
        except ServerError as error:
            raise RewardError(f"{where} {error}") from None
        except TypeError as error:
            raise RewardError(
                f"{where}: expected metadata that JSON can hold ({error}); leave such columns out of --metadata_columns"
            ) from None
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise RewardError(f"{where}: expected a JSON object with `rewards`, got {self._server.shown(answer)}")
        return answer


def remote_rewards(*rewards: Any) -> Iterator[RemoteReward]:
    """The rewards behind servers among these, and among the parts of weighted or held-out ones."""
    for reward in rewards:
        if isinstance(reward, RemoteReward):
            yield reward
        else:
            yield from remote_rewards(*getattr(reward, "parts", ()))


def _version_in(answer: Any) -> str | None:
    version = answer.get("version") if isinstance(answer, dict) else None
    return version[:MAX_VERSION_LENGTH] if isinstance(version, str) and version else None
