"""Remembers text embeddings: a prompt is encoded once, however often its chain is replayed."""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

Embeddings = tuple[torch.Tensor | None, ...]
Key = tuple[tuple[str, str], ...]


class PromptMemory:
    """Replaces a pipeline's ``encode_prompt``; least recently used prompts are forgotten first.

    Args:
        encode_prompt: the pipeline's bound method; its result is a tuple of (B, ...) tensors or None.
        max_prompts: how many prompts are remembered.
    """

    def __init__(self, encode_prompt: Callable[..., Embeddings], max_prompts: int = 256) -> None:
        self._encode_prompt = encode_prompt
        self._signature = inspect.signature(encode_prompt)
        self._max_prompts = max_prompts
        self._remembered: OrderedDict[Key, Embeddings] = OrderedDict()
        self._last: tuple[Key, Embeddings] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Embeddings:
        """Embeddings of a list of prompts, each (B, ...), joined from what is remembered of every prompt."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        key = _key(arguments)
        if self._last is None or self._last[0] != key:
            prompts = arguments["prompt"]
            count = 1 if isinstance(prompts, str) else len(prompts)
            rows = [self._encode_one(i, count, dict(arguments)) for i in range(count)]
            joined = tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*rows, strict=True))
            self._last = (key, joined)  # the replays of a trajectory ask for the same batch again and again
        return self._last[1]

    @torch.no_grad()
    def _encode_one(self, index: int, batch_size: int, arguments: dict[str, Any]) -> Embeddings:
        for name, value in arguments.items():
            if isinstance(value, list) and len(value) == batch_size:
                arguments[name] = [value[index]]
        key = _key(arguments)
        if key not in self._remembered:
            self._remembered[key] = self._encode_prompt(**arguments)
            if len(self._remembered) > self._max_prompts:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]


def _key(arguments: dict[str, Any]) -> Key:
    for name, value in arguments.items():
        if torch.is_tensor(value):
            raise ValueError(f"Expected prompts as text, got a tensor for {name}.")
    return tuple((name, str(value)) for name, value in sorted(arguments.items()))
