"""Prompts are encoded once: what their embeddings are is remembered one by one and batch by batch."""

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image

Embedding = torch.Tensor | list[torch.Tensor] | None
Embeddings = tuple[Embedding, ...]
Key = tuple[tuple[str, str], ...]

# A pipeline with two guidance branches encodes prompts and negative prompts in two calls.
JOINED_BATCHES = 4


class PromptMemory:
    """Replaces a pipeline's ``encode_prompt``; least recently used prompts are forgotten first.

    Single prompts wait in host memory (hundreds of T5's take a gigabyte); only the latest batches are on the device.

    Args:
        encode_prompt: the pipeline's bound method; its result is a tuple of (B, ...) tensors, lists of B tensors,
            tensors that all prompts share, or None.
        max_prompts: how many prompts are remembered.
        dtype: floating-point embeddings are handed out in this; None leaves them. Pipelines cast their latents to it.
    """

    def __init__(
        self, encode_prompt: Callable[..., Embeddings], max_prompts: int = 256, dtype: torch.dtype | None = None
    ) -> None:
        self._encode_prompt = encode_prompt
        self._signature = inspect.signature(encode_prompt)
        self._max_prompts = max_prompts
        self._dtype = dtype
        self._remembered: OrderedDict[Key, Embeddings] = OrderedDict()
        self._joined: OrderedDict[Key, Embeddings] = OrderedDict()
        self._device: torch.device | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Embeddings:
        """Embeddings of a list of prompts, joined from what is remembered of every prompt."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        key = _key(arguments)
        if key not in self._joined:  # the replays of a trajectory ask for the same batch again and again
            prompts = arguments["prompt"]
            if prompts is None:  # the empty text for all
                prompts = arguments["prompt"] = [""] * arguments.get("batch_size", 1)
            count = 1 if isinstance(prompts, str) else len(prompts)
            rows = [self._encode_one(i, count, dict(arguments)) for i in range(count)]
            self._joined[key] = tuple(_to(embedding, self._device, self._dtype) for embedding in _join(rows))
            if len(self._joined) > JOINED_BATCHES:
                self._joined.popitem(last=False)
        self._joined.move_to_end(key)
        # fresh lists: pipelines put theirs together with `+`
        return tuple(list(entry) if isinstance(entry, list) else entry for entry in self._joined[key])

    @torch.no_grad()
    def _encode_one(self, index: int, batch_size: int, arguments: dict[str, Any]) -> Embeddings:
        for name, value in arguments.items():
            if ("prompt" in name or name == "image") and isinstance(value, list) and len(value) == batch_size:
                arguments[name] = [value[index]]
        if "batch_size" in arguments:
            arguments["batch_size"] = 1
        key = _key(arguments)
        if key not in self._remembered:
            row = self._encode_prompt(**arguments)
            self._device = next((entry.device for entry in _tensors(row)), None)
            host = torch.device("cpu") if self._device is not None and self._device.type == "cuda" else None
            self._remembered[key] = tuple(_to(embedding, host) for embedding in row)
            if len(self._remembered) > self._max_prompts:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]


def _join(rows: list[Embeddings]) -> Embeddings:
    """One batch of the embeddings of single prompts; shorter ones are padded with zeros, and a mask says so."""
    lengths = [_length(row[0]) for row in rows]
    uneven = len(set(lengths)) > 1
    joined: list[Embedding] = []
    for place, parts in enumerate(zip(*rows, strict=True)):
        if place == 1 and uneven and any(part is None for part in parts):  # no mask where nothing was padded
            parts = tuple(
                torch.ones(1, length, dtype=torch.long, device=next(_tensors(rows[0])).device) if part is None else part
                for part, length in zip(parts, lengths, strict=True)
            )
        joined.append(_join_parts(parts))
    return tuple(joined)


def _join_parts(parts: tuple[Embedding, ...]) -> Embedding:
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, list):
        lists = [part for part in parts if isinstance(part, list)]
        if len(first) < 2:  # an entry for every sample, or none at all
            return [entry for part in lists for entry in part]
        return [torch.cat(layer) for layer in zip(*_padded_alike(lists), strict=True)]  # an entry for every layer
    tensors = [part for part in parts if torch.is_tensor(part)]
    longest = max(_length(tensor) for tensor in tensors)
    if first.shape[0] != 1:  # positions, such as FLUX's, are the same for every prompt
        return max(tensors, key=len)
    return torch.cat([_padded(tensor, longest) for tensor in tensors])


def _padded_alike(lists: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    longest = max(_length(part[0]) for part in lists)
    return [[_padded(entry, longest) for entry in part] for part in lists]


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    if tensor.ndim < 2 or tensor.shape[1] == length:
        return tensor
    padding = tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, padding], dim=1)


def _length(embedding: Embedding) -> int:
    return embedding.shape[1] if torch.is_tensor(embedding) and embedding.ndim > 1 else 0


def _tensors(row: Embeddings) -> Iterator[torch.Tensor]:
    for entry in row:
        yield from [entry] if torch.is_tensor(entry) else entry or ()


def _to(embedding: Embedding, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Embedding:
    """The embedding there, and, if it is of floating point, in this dtype."""
    if isinstance(embedding, list):
        return [entry.to(device=device, dtype=dtype) for entry in embedding]
    if embedding is None:
        return None
    return embedding.to(device=device, dtype=dtype if embedding.is_floating_point() else None)


def _key(arguments: dict[str, Any]) -> Key:
    for name, value in arguments.items():
        if torch.is_tensor(value):
            raise ValueError(f"Expected prompts as text, got a tensor for {name}.")
    return tuple((name, _in_key(value)) for name, value in sorted(arguments.items()))


def _in_key(value: Any) -> str:
    """Pictures by their pixels: their addresses are used again."""
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        return " ".join(hashlib.sha256(picture.tobytes()).hexdigest() for picture in value)
    return str(value)
