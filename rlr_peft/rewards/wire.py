"""The JSON that travels between a remote reward and its server: images as base64 PNG of 8 bits.

Request: `{"prompt": [...], "image": [base64 PNG, ...], "metadata": [{...}, ...]}`, the last one optional.
Answer: `{"rewards": [...]}` and, optionally, `"info": {name: [...]}` and `"version": "..."`; an error is
`{"error": "..."}`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

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
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return {"prompt": list(prompts), "image": [_encode(image) for image in pixels], "metadata": list(metadata)}


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
        body: its JSON.
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


def _encode(pixels: numpy.ndarray) -> str:
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
