"""Keeps text encoders off the device: they are needed once for every prompt, and are often larger than the denoiser."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn


class OffloadedTextEncoders:
    """A pipeline's text encoders, on the CPU but while they encode.

    Args:
        pipeline: its text encoders are moved to the CPU at once.
        device: where they encode.
    """

    def __init__(self, pipeline: DiffusionPipeline, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._encoders = {
            name: part
            for name, part in pipeline.components.items()
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }
        self._move(torch.device("cpu"))

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, the pipeline has no text encoders: it takes its device from the models that it sees."""
        self._show(False)
        try:
            yield
        finally:
            self._show(True)

    def encoding(self, encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
        """The pipeline's bound ``encode_prompt``, for the inside of ``hidden``."""

        @functools.wraps(encode_prompt)
        def encode(*args: Any, **kwargs: Any) -> Any:
            self._show(True)
            self._move(self._device)
            try:
                return encode_prompt(*args, **kwargs)
            finally:
                self._move(torch.device("cpu"))
                self._show(False)

        return encode

    def _show(self, shown: bool) -> None:
        for name, encoder in self._encoders.items():
            # past the pipeline's __setattr__, which would drop the class from its config
            self._pipeline.__dict__[name] = encoder if shown else None

    def _move(self, device: torch.device) -> None:
        for encoder in self._encoders.values():
            encoder.to(device)
