"""Leaves out prompts that hold words of a list: published adapters carry their prompts."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

from rlr_peft.prompt import Prompt, PromptError
from rlr_peft.prompts.files import prompt_lines

logger = logging.getLogger(__name__)


def word_filter(path: str) -> Callable[[Prompt], bool]:
    """Whether a prompt and its stage prompts hold none of the words and phrases in a file, in small or capital letters.

    Args:
        path: UTF-8, one a line; a word counts where it stands alone, and not inside another one.

    Raises:
        PromptError: no such file, or an empty one.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            words = [word for word, _ in prompt_lines(file, path)]
    except OSError as error:
        raise PromptError(f"prompt_filter '{path}': cannot be read: {error.strerror}") from None
    if not words:
        raise PromptError(f"prompt_filter '{path}': the file holds no word; write one a line")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    return lambda prompt: not any(pattern.search(text) for text in (prompt.text, *prompt.stages))


def filtered(prompts: list[Prompt], is_clean: Callable[[Prompt], bool], path: str) -> list[Prompt]:
    """The prompts that are left, and a line of the log on how many are not.

    Raises:
        PromptError: none is left.
    """
    kept = [prompt for prompt in prompts if is_clean(prompt)]
    if not kept:
        raise PromptError(f"prompt_filter '{path}': it leaves none of {len(prompts)} prompts; correct the list")
    if len(kept) < len(prompts):
        logger.info("%d of %d prompts are left out by %s.", len(prompts) - len(kept), len(prompts), path)
    return kept
