"""The JSON that travels between a remote reward and its server: images as base64 PNG of 8 bits.

Request: `{"prompt": [...], "image": [base64 PNG, ...], "metadata": [{...}, ...]}`, the last one optional.
Answer: `{"rewards": [...]}` and, optionally, `"info": {name: [...]}`; an error is `{"error": "..."}`.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor


class WireError(ValueError):
    """A request that does not keep to the protocol."""


def request_body(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A request.

    Args:
        images: (B, 3, H, W) in [0, 1]; rounded to 8 bits.
        prompts: B prompts.
        metadata: B dictionaries that JSON can hold.
    """
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return {"prompt": list(prompts), "image": [_encode(image) for image in pixels], "metadata": list(metadata)}


def read_request(body: Any) -> tuple[list[Tensor], list[str], list[dict[str, Any]]]:
    """Images (3, H, W) in [0, 1], which may differ in size, prompts and metadata of a request.

    Raises:
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
    return [_decode(index, image) for index, image in enumerate(images)], prompts, metadata


def _encode(pixels: numpy.ndarray) -> str:
    file = io.BytesIO()
    # The fastest compression: the network is faster than the strongest one.
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _decode(index: int, text: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            pixels = numpy.asarray(image.convert("RGB"))
    except (binascii.Error, OSError, ValueError, Image.DecompressionBombError) as error:
        raise WireError(f"`image` {index}: expected a base64 PNG ({type(error).__name__}: {error})") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
