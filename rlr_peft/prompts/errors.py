"""What goes wrong with prompts."""

from rlr_peft.errors import UserError


class PromptError(UserError, ValueError):
    """Prompts could not be read or split into stages; the message says what was expected, found, and what to do."""


def in_words(source: str, place: str = "") -> str:
    """Where a message is about: the source, and the line or row in it if there is one."""
    return f"prompts '{source}'" + (f", {place}" if place else "")
