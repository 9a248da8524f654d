"""What a pipeline encodes, prompts and the pictures it draws from, is encoded once and remembered.

A replay of one step is a whole call, in which a pipeline encodes them again. What they are encoded to depends on them
alone. Single prompts and pictures wait in host memory (hundreds of T5's prompts take a gigabyte); only the latest
batches are on the device.

And how long a prompt may be, of which a text encoder sees the beginning alone.
"""

import hashlib
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image

from rlr_peft.prompt import ConditionImage, Prompt

Embedding: TypeAlias = torch.Tensor | list[Any] | None
Embeddings: TypeAlias = tuple[Embedding, ...]
Key: TypeAlias = tuple[Any, ...]

# A pipeline with two guidance branches encodes prompts and negative prompts in two calls.
MAX_PROMPTS, MAX_IMAGES, JOINED_BATCHES = 256, 128, 4
# LTX-2 takes every layer of its text encoder, .7 GiB a prompt of 1,024 tokens: fewer are remembered then, and two
# batches at least, of prompts and of negative prompts.
MAX_PROMPT_BYTES, MAX_JOINED_BYTES = 2**34, 2**31


class PromptCache:
    """Replaces a pipeline's ``encode_prompt``.

    Args:
        encode_prompt: the pipeline's bound method; its result is a tuple of (B, ...) tensors, lists of B tensors or of
            B lists of them, tensors that all prompts share, or None.
        dtype: floating-point embeddings are handed out in this: pipelines cast their latents to it.
    """

    def __init__(self, encode_prompt: Callable[..., Embeddings], dtype: torch.dtype) -> None:
        self._encode_prompt = encode_prompt
        self._signature = inspect.signature(encode_prompt)
        self._dtype = dtype
        self._single: OrderedDict[Key, Embeddings] = OrderedDict()
        self._joined: OrderedDict[Key, Embeddings] = OrderedDict()
        self._device: torch.device | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Embeddings:
        """Embeddings of a list of prompts, joined from what is remembered of every prompt."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        joined = _remembered(self._joined, _key(arguments), lambda: self._encode_all(arguments), JOINED_BATCHES)
        _shrink(self._joined, MAX_JOINED_BYTES, least=2)
        # fresh lists: pipelines put theirs together with `+`
        return tuple(list(entry) if isinstance(entry, list) else entry for entry in joined)

    def _encode_all(self, arguments: dict[str, Any]) -> Embeddings:
        prompts = arguments["prompt"]
        if prompts is None:  # the empty text for all
            prompts = arguments["prompt"] = [""] * arguments.get("batch_size", 1)
        count = 1 if isinstance(prompts, str) else len(prompts)
        rows = [self._encode_one(i, count, dict(arguments)) for i in range(count)]
        return tuple(_to(embedding, self._device, self._dtype) for embedding in _join(rows))

    @torch.no_grad()
    def _encode_one(self, index: int, batch_size: int, arguments: dict[str, Any]) -> Embeddings:
        for name, value in arguments.items():
            if ("prompt" in name or name == "image") and isinstance(value, list) and len(value) == batch_size:
                arguments[name] = [value[index]]
        if "batch_size" in arguments:
            arguments["batch_size"] = 1

        def encode() -> Embeddings:
            row = self._encode_prompt(**arguments)
            self._device = next((entry.device for entry in _tensors(row)), None)
            host = torch.device("cpu") if self._device is not None and self._device.type == "cuda" else None
            return tuple(_to(embedding, host) for embedding in row)

        embeddings: Embeddings = _remembered(self._single, _key(arguments), encode, MAX_PROMPTS)
        _shrink(self._single, MAX_PROMPT_BYTES, least=1)
        return embeddings


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


def _remembered(cache: OrderedDict[Key, Any], key: Key, make: Callable[[], Any], most: int) -> Any:
    """What is remembered under a key, or is made now; least recently used entries are forgotten first."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


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
        yield from [entry] if torch.is_tensor(entry) else _tensors(tuple(entry or ()))


def _shrink(cache: OrderedDict[Key, Embeddings], most: int, least: int) -> None:
    """Forgets the least recently used entries until the others have so many bytes at most, or are so few."""
    while len(cache) > least and sum(tensor.nbytes for row in cache.values() for tensor in _tensors(row)) > most:
        cache.popitem(last=False)


def _to(embedding: Embedding, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Embedding:
    """The embedding there, and, if it is of floating point, in this dtype."""
    if isinstance(embedding, list):
        return [_to(entry, device, dtype) for entry in embedding]
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


# Enough to tell; tokenising all of a large set would delay the start.
MAX_CHECKED = 10_000
# Tokenizers without a limit of their own say so by a huge number.
UNLIMITED = 1_000_000
# T5's in pipelines that do not say.
DEFAULT_SEQUENCE_LENGTH = 512
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class OverLong:
    """Prompts that lose their end.

    Attributes:
        count: how many.
        checked: of how many texts, stage prompts among them.
        limit: tokens that the text encoder sees, start and end included.
        example: the longest of them, in tokens.
        example_tokens: its tokens.
    """

    count: int
    checked: int
    limit: int
    example: str
    example_tokens: int

    def describe(self) -> str:
        """One sentence for the log."""
        text = self.example if len(self.example) <= 80 else f"{self.example[:77]}..."
        return (
            f"{self.count} of {self.checked} prompts and stage prompts are longer than the {self.limit} tokens that "
            f"the text encoder sees and lose their end; the longest has {self.example_tokens}: {text!r}."
        )


class TextRoom:
    """How much of a text the text encoders see: a model with several loses text only where the roomiest does.

    Args:
        tokenizers: of the pipeline; without any, nothing is lost.
        max_sequence_length: of tokenizers that leave it to the pipeline; None for 512.

    Attributes:
        limit: in tokens, start and end included.
    """

    def __init__(self, tokenizers: Sequence[Any], max_sequence_length: int | None) -> None:
        rooms = [(_limit(tokenizer, max_sequence_length), tokenizer) for tokenizer in tokenizers]
        nothing: tuple[int, Any] = UNLIMITED, None
        self.limit, self._tokenizer = max(rooms, key=lambda room: room[0], default=nothing)

    @classmethod
    def of(cls, pipeline: Any, max_sequence_length: int | None) -> Self:
        """Of a pipeline that is called with so many tokens; None for its own default."""
        tokenizers = [part for name in TOKENIZERS if (part := getattr(pipeline, name, None)) is not None]
        return cls(tokenizers, max_sequence_length or default_sequence_length(pipeline))

    def beyond(self, texts: Sequence[str]) -> list[tuple[int, str]]:
        """Those of the texts that lose their end, each with its tokens."""
        # A token is at least one byte of text, and most texts are too short for a doubt.
        doubtful = [text for text in texts if len(text.encode()) + 2 > self.limit]
        if self._tokenizer is None or not doubtful:
            return []
        lengths = map(len, self._tokenizer(doubtful, verbose=False)["input_ids"])
        return [(length, text) for length, text in zip(lengths, doubtful, strict=True) if length > self.limit]


def find_over_long(prompts: Sequence[Prompt], room: TextRoom) -> OverLong | None:
    """Counts prompts and stage prompts that lose their end; None without any.

    Args:
        prompts: at most the first 10,000 different texts, stage prompts among them, are looked at.
    """
    different = dict.fromkeys(text for prompt in prompts for text in (prompt.stages or (prompt.text,)))
    texts = list(itertools.islice(different, MAX_CHECKED))
    over = room.beyond(texts)
    if not over:
        return None
    length, text = max(over, key=lambda pair: pair[0])
    return OverLong(len(over), len(texts), room.limit, text, length)


def default_sequence_length(pipeline: Any) -> int | None:
    """The ``max_sequence_length`` that a pipeline's call takes by itself, such as 256 of SD3; None if it takes none."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def _limit(tokenizer: Any, max_sequence_length: int | None) -> int:
    own = int(tokenizer.model_max_length)
    if type(tokenizer).__name__.startswith("CLIP"):  # its length is the text encoder's, whatever a pipeline is told
        return own
    return min(own if own < UNLIMITED else DEFAULT_SEQUENCE_LENGTH, max_sequence_length or DEFAULT_SEQUENCE_LENGTH)
