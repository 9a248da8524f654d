"""Holding prompts back for evaluation: by their text, so that a repeated prompt is never on both sides."""

import hashlib
from collections.abc import Sequence

from rlr_peft.prompts.errors import PromptError


def hold_back(prompts: Sequence[str], percentage: float) -> tuple[list[str], list[str]]:
    """Training and held-back prompts, each in their order.

    The choice depends on the texts and the percentage alone, not on the seed: runs with other seeds are compared on the
    same unseen prompts.

    Args:
        prompts: all prompts.
        percentage: of the different texts, above 0 and below 100; at least one is held back and one is left.

    Raises:
        PromptError: fewer than two different prompts.
    """
    texts = sorted(set(map(str, prompts)), key=_rank)
    if len(texts) < 2:
        raise PromptError(
            "expected at least 2 different prompts to hold some back, got 1; drop validation_split_percentage"
        )
    count = min(max(1, round(len(texts) * percentage / 100)), len(texts) - 1)
    held = set(texts[:count])
    return [prompt for prompt in prompts if prompt not in held], [prompt for prompt in prompts if prompt in held]


def is_held_back(prompt: str, percentage: float) -> bool:
    """The same for a prompt alone, of a stream whose number of texts is not known: the share holds on average."""
    return int.from_bytes(_rank(prompt)[:8], "big") < percentage / 100 * 2**64


def _rank(text: str) -> bytes:
    return hashlib.sha256(f"held back/{text}".encode()).digest()
