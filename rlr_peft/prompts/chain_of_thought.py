"""Stage prompts for the Diffusive Chain-of-Thought: whoever splits a prompt, and the file that remembers it."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlr_peft.prompt import Prompt, with_stages
from rlr_peft.prompts.errors import PromptError

Decomposer = Callable[[str], Sequence[str]]
"""Splits a prompt into one text per stage, noise first; raises ``PromptError`` for one that it cannot split."""

MAX_STAGE_PROMPT_LENGTH = 1000
"""Characters; what is longer is no prompt but a model that does not stop."""


class MalformedStagesError(ValueError):
    """An answer that is not one text per stage; the message says what is wrong with it, for another try."""


def decompose_prompts(prompts: Sequence[str], decompose: Decomposer) -> list[str]:
    """The same prompts with stage prompts; those of one text are asked for once.

    Raises:
        PromptError: a prompt cannot be split.
    """
    stages = {text: tuple(decompose(text)) for text in dict.fromkeys(str(prompt) for prompt in prompts)}
    return [with_stages(prompt, stages[str(prompt)]) for prompt in prompts]


def parse_stages(answer: str, names: Sequence[str]) -> tuple[str, ...]:
    """The stage prompts of a model's answer: the first JSON object in it, with one text for every name.

    Raises:
        MalformedStagesError: anything else.
    """
    start = answer.find("{")
    if start < 0:
        raise MalformedStagesError("no JSON object")
    try:
        found, _ = json.JSONDecoder().raw_decode(answer, start)
    except json.JSONDecodeError as error:
        raise MalformedStagesError(f"not valid JSON ({error.msg} at character {error.pos})") from None
    return check_stages(found, names)


def check_stages(found: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The texts of a mapping, in the order of the names.

    Raises:
        MalformedStagesError: a name is missing, there are others, or a text is none, blank or endless.
    """
    if not isinstance(found, dict) or set(found) != set(names):
        got = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise MalformedStagesError(f"expected the keys {', '.join(names)}, got {got or 'none'}")
    for name in names:
        text = found[name]
        if not isinstance(text, str) or not text.strip():
            raise MalformedStagesError(f"expected a text for {name}, got {text!r:.60}")
        if len(text) > MAX_STAGE_PROMPT_LENGTH:
            raise MalformedStagesError(
                f"expected at most {MAX_STAGE_PROMPT_LENGTH} characters for {name}, got {len(text)}"
            )
    return tuple(found[name].strip() for name in names)


class RememberedStages:
    """A decomposer with a memory that users can read and edit: a JSONL file, one prompt a line.

    A line is ``{"prompt": ..., STAGE: ..., ...}``. What stands there is used as it is; only prompts that are missing
    are split, and appended. Of two lines for one prompt the later one holds.

    Args:
        decompose: splits what the file does not hold.
        path: the file; it need not exist.
        names: of the stages.

    Raises:
        PromptError: the file cannot be read, or a line is not of this form; the message names it.
    """

    def __init__(self, decompose: Decomposer, path: Path, names: Sequence[str]) -> None:
        self._decompose = decompose
        self._path = path
        self._names = tuple(names)
        self._known: dict[str, tuple[str, ...]] = {}
        if path.exists():
            for number, line in enumerate(_lines(path), start=1):
                if line.strip():
                    self._remember(line, number)

    def __call__(self, prompt: str) -> tuple[str, ...]:
        """The stage prompts, from the file or newly split."""
        text = str(prompt)
        if text not in self._known:
            stages = tuple(self._decompose(text))
            self._append({"prompt": text, **dict(zip(self._names, stages, strict=True))})
            self._known[text] = stages
        return self._known[text]

    def _remember(self, line: str, number: int) -> None:
        try:
            entry = json.loads(line)
            prompt = entry.pop("prompt")
            if not isinstance(prompt, str):
                raise MalformedStagesError(f"expected a text for prompt, got {prompt!r:.60}")
            self._known[prompt] = check_stages(entry, self._names)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise PromptError(
                f'{self._path}, line {number}: expected {{"prompt": ..., {", ".join(self._names)}}}: {error}; '
                "correct or "
                "delete the line"
            ) from error

    def _append(self, entry: dict[str, str]) -> None:
        """On the disk before the next question: answers may have cost money."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # An editor may have left the last line without its end.
        starts_line = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("" if starts_line else "\n") + json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def as_prompt(given: "str | Sequence[str] | dict[str, str]", names: Sequence[str], decompose: Decomposer) -> Prompt:
    """A prompt with stage prompts from whatever a person gives.

    Args:
        given: a text, which is split unless it carries stage prompts; a sequence of one text per stage; or a mapping of
            stage names to texts.
        names: of the stages, noise first.
        decompose: splits texts.

    Raises:
        PromptError: another number of stages, or other names.
    """
    if isinstance(given, Prompt) and given.stages:
        return given
    if isinstance(given, str):
        return with_stages(given, decompose(given))
    found = given if isinstance(given, dict) else dict(zip(names, given, strict=False))
    try:
        if not isinstance(given, dict) and len(given) != len(names):
            raise MalformedStagesError(f"expected one text for each of {', '.join(names)}, got {len(given)}")
        stages = check_stages(found, names)
    except MalformedStagesError as error:
        raise PromptError(f"stage prompts {given!r:.200}: {error}") from None
    return Prompt(stages[-1], stages=stages)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 text: {error}") from error
