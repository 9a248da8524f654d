"""Pictures that samples are drawn from, on their way into a pipeline's call: in the form it takes, and encoded once.

A replay of one step is a whole call, in which a pipeline encodes its pictures again. What they are encoded to depends
on them alone, so it is remembered, as the embeddings of prompts are.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from rlr_peft.chain.families import ImagesOfCall
from rlr_peft.prompt import ConditionImage, Prompt

MAX_IMAGES = 128
"""Single pictures that are remembered, in host memory."""

JOINED_BATCHES = 4
"""Latest batches that are remembered, on the device."""

Key: TypeAlias = tuple[Any, ...]


def batches_of_one_call(images: ImagesOfCall, prompts: Sequence[Prompt]) -> list[slice]:
    """Which neighbours among the samples one call can draw: all, those of one picture, or a single one."""
    if images == "any":
        return [slice(0, len(prompts))]
    single = images == "one sample"
    batches, start = [], 0
    for _, samples in groupby(enumerate(prompts), lambda numbered: (single and numbered[0], numbered[1].image)):
        stop = start + len(list(samples))
        batches.append(slice(start, stop))
        start = stop
    return batches


class EncodedImages:
    """Replaces ``vae.encode`` and ``encode_image`` of a pipeline while it is called.

    What a VAE encodes a picture to is the mean of its posterior, also where the pipeline would draw from that: a
    replayed step must see what the sampled one saw. The pipeline's own random numbers are drawn, and not used.

    Args:
        pipeline: of which the VAE and the encoder of images are taken.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline = pipeline
        self._vae: Any = getattr(pipeline, "vae", None)
        self._means: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._joined: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._embeds: OrderedDict[Key, Any] = OrderedDict()

    @contextmanager
    def of(self, images: Sequence[tuple[ConditionImage | None, tuple[int, int]]]) -> Iterator[None]:
        """Inside, the pipeline is called with these pictures, each of that width and height in pixels; None is grey."""
        pipeline, vae = self._pipeline, self._pipeline.vae  # what decodes for a reward may stand in for the VAE
        vae.encode = self._encoding(tuple(images))
        embeds = hasattr(pipeline, "encode_image")
        if embeds:
            pipeline.encode_image = self._embedding(tuple(images), pipeline.encode_image)
        try:
            yield
        finally:
            del vae.encode
            if embeds:
                del pipeline.encode_image

    def _encoding(self, images: Key) -> Callable[..., Any]:
        own = type(self._vae).encode.__get__(self._vae)
        calls = 0

        def encode(pixels: torch.Tensor, return_dict: bool = True) -> Any:
            nonlocal calls
            number, calls = calls, calls + 1
            if len(pixels) == len(images):
                rows = [(image, number) for image in images]
            elif len(pixels) == 1:  # one by one
                rows = [(images[number % len(images)], number // len(images))]
            else:
                return own(pixels, return_dict=return_dict)
            about = (tuple(pixels.shape[1:]), pixels.dtype, pixels.device)
            mean = _remembered(
                self._joined,
                (tuple(rows), *about),
                lambda: torch.cat([self._mean((row, *about), pixels[i : i + 1], own) for i, row in enumerate(rows)]),
                JOINED_BATCHES,
            )
            posterior = DiagonalGaussianDistribution(torch.cat([mean, torch.zeros_like(mean)], 1), deterministic=True)
            return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

        return encode

    @torch.no_grad()
    def _mean(self, key: Key, pixels: torch.Tensor, encode: Callable[..., Any]) -> torch.Tensor:
        """Of one picture, in the precision and on the device of the pixels; the VAE may have another precision."""

        def mean() -> torch.Tensor:
            found = encode(pixels.to(self._vae.dtype)).latent_dist.mean.to(pixels.dtype)
            return found.cpu() if found.device.type == "cuda" else found

        return _remembered(self._means, key, mean, MAX_IMAGES).to(pixels.device)

    def _embedding(self, images: Key, own: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def encode_image(*args: Any, **kwargs: Any) -> Any:
            return _remembered(self._embeds, images, lambda: own(*args, **kwargs), MAX_IMAGES)

        return encode_image


def _remembered(memory: OrderedDict[Key, Any], key: Key, make: Callable[[], Any], most: int) -> Any:
    """What is remembered under a key, or is made now; least recently used entries are forgotten first."""
    if key not in memory:
        memory[key] = make()
        if len(memory) > most:
            memory.popitem(last=False)
    memory.move_to_end(key)
    return memory[key]
