"""What goes wrong with prompts."""

from rlr_peft.errors import UserError


class PromptError(UserError, ValueError):
    """Prompts could not be read or split into stages; the message says what was expected, found, and what to do."""
