"""Prompts that are longer than what a text encoder sees."""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from rlr_peft.prompt import Prompt

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
