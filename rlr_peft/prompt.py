"""A prompt, and what belongs to it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rlr_peft.errors import UserError

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Prompt(str):
    """A text that carries what else its source says about it; it cannot be changed.

    It IS its text: statistics per prompt, figures, cards, rewards and libraries take it as they take any text, and only
    two places look further. The chain asks for stage prompts and negative prompt, the reward's door for metadata. With
    lists in parallel every function between these two would have to pass them on, and any plain text would have to be
    wrapped first. Two prompts of one text are equal, whatever else they carry; a text that is derived from a prompt,
    such as ``prompt.strip()``, is a plain one.

    Args:
        text: what is drawn.
        negative_prompt: what guidance steers away from for this prompt; None leaves it to the chain.
        stages: the prompt of every stage of a Diffusive Chain-of-Thought, noise first; empty for the same in all.
        metadata: what rewards are told besides the text.
    """

    __slots__ = ("metadata", "negative_prompt", "stages")

    negative_prompt: str | None
    stages: tuple[str, ...]
    metadata: Mapping[str, Any]

    def __new__(
        cls,
        text: str,
        negative_prompt: str | None = None,
        stages: Sequence[str] = (),
        metadata: Mapping[str, Any] = NOTHING,
    ) -> "Prompt":
        prompt = super().__new__(cls, text)
        object.__setattr__(prompt, "negative_prompt", negative_prompt)
        object.__setattr__(prompt, "stages", tuple(stages))
        object.__setattr__(prompt, "metadata", MappingProxyType(dict(metadata)))
        return prompt

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a prompt cannot be changed: make a new Prompt to give it another {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompt, (str(self), self.negative_prompt, self.stages, dict(self.metadata))


def stages_of(prompt: str) -> tuple[str, ...]:
    """The stage prompts of a prompt; none of a plain text."""
    return prompt.stages if isinstance(prompt, Prompt) else ()


def negative_prompt_of(prompt: str) -> str | None:
    """What guidance steers away from for this prompt; None of a plain text."""
    return prompt.negative_prompt if isinstance(prompt, Prompt) else None


def metadata_of(prompt: str) -> dict[str, Any]:
    """What rewards are told besides the text, in a dictionary of its own; empty of a plain text."""
    return dict(prompt.metadata) if isinstance(prompt, Prompt) else {}


def with_stages(prompt: str, stages: Sequence[str]) -> Prompt:
    """The same prompt with stage prompts."""
    return Prompt(prompt, negative_prompt_of(prompt), stages, metadata_of(prompt))


class PromptError(UserError, ValueError):
    """Prompts could not be read or split into stages; the message says what was expected, found, and what to do."""
