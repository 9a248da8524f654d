"""A reward behind `http(s)://`: images go out as base64 PNG of 8 bits in JSON, scores come back. Nothing is pickled.

Request: `{"prompt": [...], "image": [base64 PNG, ...], "metadata": [{...}, ...]}`, the last one optional.
Answer: `{"rewards": [...]}` and, optionally, `"info": {name: [...]}` and `"version": "..."`; an error is
`{"error": "..."}`.

An address that ends in `/compute` is asked as Flow-Factory asks its servers: with whole videos too, condition images,
and metadata by column.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from rlr_peft.errors import RewardError
from rlr_peft.json_server import JsonServer, NoAnswerError, ServerError
from rlr_peft.redaction import redacted_address
from rlr_peft.rewards.base import CONDITION_IMAGE, Metadata, Reward, Scored, join_scored
from rlr_peft.rewards.preprocessing import to_8_bit
from rlr_peft.rewards.scores import check_scores, info_of

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


class RemoteReward(Reward):
    """Asks a server that speaks the protocol of `docs/rewards.md`, such as `rlr-peft serve-reward`.

    Args:
        url: where to POST; a user name and password in it are sent, and said nowhere.

    Attributes:
        version: what the latest answer said of the server's version; None where it said nothing. It warns when that
            changes, as scores of two versions do not compare.

    Raises:
        RewardError: not an http(s) URL with a host.
    """

    overlaps = True

    def __init__(self, url: str, settings: RemoteSettings | None = None) -> None:
        self._settings = settings or RemoteSettings()
        try:
            self._server = JsonServer(url, self._settings.timeout, self._settings.retries, self._settings.backoff)
        except ValueError as error:
            raise RewardError(f"reward server '{redacted_address(url)}': {error}") from None
        self.name = self._server.name
        self._body = compute_body if self.name.endswith("/compute") else request_body
        self.takes_video = self.takes_images = self._body is compute_body
        self.version: str | None = None

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """The server's scores and info.

        Raises:
            RewardError: no answer after all retries, a refusal (4xx), or an answer that is not one finite number per
                image.
        """
        size = self._settings.batch_size
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        return join_scored([self._score(images[part], prompts[part], metadata[part]) for part in parts])

    def _score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        answer = self._ask(self._body(images, prompts, metadata))
        self._note_version(answer)
        returned = check_scores(self.name, answer["rewards"], prompts), answer.get("info")
        return Scored(returned[0], info=info_of(returned, len(prompts)))

    def state_dict(self) -> dict[str, Any]:
        """The latest version, under the server's name."""
        return {self.name: self.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it: the first answer of another version is warned of."""
        self.version = state.get(self.name)

    def ask_version(self) -> str | None:
        """What the server says of its version to a GET; None where it says nothing, or does not answer."""
        return _version_in(self._server.look())

    def _note_version(self, answer: dict[str, Any]) -> None:
        version = _version_in(answer)
        if self.version is not None and version != self.version:
            logger.warning(
                "Reward server '%s' has changed: it is of version %s now and was of %s. Scores from before and "
                "after the change cannot be compared.",
                *(self.name, version or "an unknown one", self.version),
            )
        self.version = version

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        where = f"reward server '{self.name}'"
        try:
            with explaining(where):
                answer = self._server.ask(body)
        except TypeError as error:
            raise RewardError(
                f"{where}: expected metadata that JSON can hold ({error}); leave such columns out of --metadata_columns"
            ) from None
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise RewardError(f"{where}: expected a JSON object with `rewards`, got {self._server.shown(answer)}")
        return answer


@contextmanager
def explaining(where: str) -> Iterator[None]:
    """Inside, what a server does wrong is the reward's error, which names it."""
    try:
        yield
    except NoAnswerError as error:
        raise RewardError(
            f"{where} {error}; check that it runs and is reachable, or raise --reward_server_timeout"
        ) from None
    except ServerError as error:
        raise RewardError(f"{where} {error}") from None


def _version_in(answer: Any) -> str | None:
    version = answer.get("version") if isinstance(answer, dict) else None
    return version[:MAX_VERSION_LENGTH] if isinstance(version, str) and version else None


MAX_VALUES = 1_000_000


class WireError(ValueError):
    """A request that does not keep to the protocol.

    Attributes:
        status: of the answer.
    """

    status = HTTPStatus.BAD_REQUEST


class TooLargeError(WireError):
    """A request that asks for more than the server gives."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def request_body(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A request.

    Args:
        images: (B, 3, H, W) in [0, 1]; rounded to 8 bits.
        prompts: B prompts.
        metadata: B dictionaries that JSON can hold.
    """
    return {
        "prompt": list(prompts),
        "image": [encode_png(image) for image in to_8_bit(images)],
        "metadata": [_for_json(entry) for entry in metadata],
    }


CONDITION_IMAGES = "condition_images"  # in the metadata: base64 texts


def _for_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with the picture that a sample is drawn from as a base64 PNG."""
    told = dict(metadata)
    if CONDITION_IMAGE in told:
        told[CONDITION_IMAGES] = [encode_png(to_8_bit(told.pop(CONDITION_IMAGE)[None])[0])]
    return told


def compute_body(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A request in the form of Flow-Factory's `/compute`.

    Args:
        images: (B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1]; rounded to 8 bits.
        prompts: B prompts.
        metadata: B dictionaries that JSON can hold. `condition_images`, lists of base64 PNGs, go to their own field;
            what all others have becomes a column of `extra`.
    """
    is_video, metadata = images.ndim == 5, [_for_json(entry) for entry in metadata]
    pixels = to_8_bit(images)
    encoded: list[Any] = [[*map(encode_png, frames)] for frames in pixels] if is_video else [*map(encode_png, pixels)]
    columns = [name for name in metadata[0] if name != CONDITION_IMAGES and all(name in entry for entry in metadata)]
    conditions = [entry.get(CONDITION_IMAGES) or [] for entry in metadata]
    return {
        "prompt": list(prompts),
        "image": None if is_video else encoded,
        "video": encoded if is_video else None,
        CONDITION_IMAGES: conditions if any(conditions) else None,
        "condition_videos": None,
        "extra": {name: [entry[name] for entry in metadata] for name in columns} or None,
    }


def parse_body(body: bytearray) -> Any:
    """The JSON of a request, whose bytes are emptied: a large one is not held twice.

    Raises:
        TooLargeError: more than `MAX_VALUES` values: three bytes of an empty list become 64 in memory.
        WireError: no JSON.
    """
    num_values = sum(map(body.count, b"[{,"))  # or more: texts may hold these marks too
    if num_values > MAX_VALUES:
        raise TooLargeError(f"expected JSON of at most {MAX_VALUES} values, got about {num_values}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("expected JSON") from None
    finally:
        body.clear()


def read_request(body: Any, max_pixels: int) -> tuple[list[Tensor], list[str], list[dict[str, Any]]]:
    """Images, prompts and metadata of a request.

    Args:
        max_pixels: of all images together. PIL refuses a single image of more than twice its own `MAX_IMAGE_PIXELS`
            (179 megapixels) besides, and stays as it is: it holds for the whole process.

    Returns:
        Images (3, H, W) uint8, which may differ in size; as many prompts; as many dictionaries.

    Raises:
        TooLargeError: the images have more pixels. None of them has been decoded then.
        WireError: a field is missing or of the wrong type, the numbers differ, or an image is no PNG.
    """
    if not isinstance(body, dict):
        raise WireError(f"expected a JSON object, got {type(body).__name__}")
    prompts, images = body.get("prompt"), body.get("image")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise WireError("`prompt`: expected a list of texts")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise WireError("`image`: expected a list of base64 texts")
    metadata = body.get("metadata") or [{} for _ in prompts]
    if not isinstance(metadata, list) or not all(isinstance(entry, dict) for entry in metadata):
        raise WireError("`metadata`: expected a list of objects")
    if not prompts or not len(prompts) == len(images) == len(metadata):
        raise WireError(
            f"expected as many prompts, images and metadata, one or more; got {len(prompts)}, {len(images)} and "
            f"{len(metadata)}"
        )
    files = [_open(index, image) for index, image in enumerate(images)]
    num_pixels = sum(file.width * file.height for file in files)
    if num_pixels > max_pixels:
        raise TooLargeError(
            f"expected images of at most {max_pixels / 1e6:g} megapixels in a request, got {num_pixels / 1e6:.1f}; "
            "send fewer at once (--reward_server_batch_size) or smaller ones, or start the server with a higher "
            "--max_megapixels"
        )
    return [_decode(index, file) for index, file in enumerate(files)], prompts, metadata


def encode_png(pixels: numpy.ndarray) -> str:
    """(H, W, 3) uint8 as a base64 PNG."""
    file = io.BytesIO()
    # The fastest compression: the network is faster than the strongest one.
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _open(index: int, text: str) -> Image.Image:
    """The file with its size; pixels are not decoded yet."""
    try:
        return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"`image` {index}: {error}") from None
    except Exception as error:  # of damaged files PIL raises SyntaxError, struct.error, zlib.error and more
        raise WireError(f"`image` {index}: expected a base64 PNG ({type(error).__name__})") from None


def _decode(index: int, file: Image.Image) -> Tensor:
    try:
        with file:
            pixels = numpy.asarray(file.convert("RGB"))
    except Exception as error:
        raise WireError(f"`image` {index}: expected a whole PNG ({type(error).__name__})") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
