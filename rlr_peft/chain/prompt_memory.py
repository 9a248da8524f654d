"""Remembers text embeddings: a prompt is encoded once, however often its chain is replayed."""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

Embeddings = tuple[torch.Tensor | None, ...]


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
        self._remembered: OrderedDict[tuple[Any, ...], Embeddings] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Embeddings:
        """Embeddings of a list of prompts, each (B, ...), joined from what is remembered of every prompt."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        prompts = arguments["prompt"]
        if isinstance(prompts, str):
            prompts = [prompts]
        rows = [self._encode_one(i, len(prompts), dict(arguments)) for i in range(len(prompts))]
        return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*rows, strict=True))

    @torch.no_grad()
    def _encode_one(self, index: int, batch_size: int, arguments: dict[str, Any]) -> Embeddings:
        for name, value in arguments.items():
            if torch.is_tensor(value):
                raise ValueError(f"Expected prompts as text, got a tensor for {name}.")
            if isinstance(value, list) and len(value) == batch_size:
                arguments[name] = [value[index]]
        key = tuple((name, str(value)) for name, value in sorted(arguments.items()))
        if key not in self._remembered:
            self._remembered[key] = self._encode_prompt(**arguments)
            if len(self._remembered) > self._max_prompts:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]
