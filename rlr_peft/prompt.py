"""A prompt, and what belongs to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from rlr_peft.errors import UserError


class PromptError(UserError, ValueError):
    """Prompts could not be read or split into stages; the message says what was expected, found, and what to do."""


@dataclass(frozen=True)
class Prompt:
    """What a sample is drawn from, and what its source says besides.

    Attributes:
        text: what is drawn; ``str(prompt)`` gives it too.
        negative_prompt: what guidance steers away from for this prompt; None leaves it to the chain.
        stages: the prompt of every stage of a Diffusive Chain-of-Thought, noise first; empty for the same in all.
        metadata: what rewards are told besides the text; read-only.
    """

    text: str
    negative_prompt: str | None = None
    stages: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompt, (self.text, self.negative_prompt, self.stages, dict(self.metadata))


PromptLike: TypeAlias = Prompt | str
"""A prompt, or the text of one that has nothing besides."""


def as_prompt(given: PromptLike) -> Prompt:
    """The prompt itself, or one of a plain text."""
    return given if isinstance(given, Prompt) else Prompt(given)


def as_prompts(given: Iterable[PromptLike]) -> list[Prompt]:
    """All of them as prompts."""
    return [as_prompt(one) for one in given]


def texts_of(prompts: Iterable[PromptLike]) -> list[str]:
    """What is drawn, without the rest."""
    return [str(prompt) for prompt in prompts]
