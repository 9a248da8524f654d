"""Prompts from a file or from tiny-shapes, and the order in which training uses them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from rlr_peft.errors import UserError
from rlr_peft.tiny_shapes import scenes


class PromptError(UserError, ValueError):
    """The prompts could not be read; the message says what was expected, what was found and what to do."""


def load_prompts(spec: str, max_samples: int | None = None) -> list[str]:
    """Read prompts.

    Args:
        spec: `tiny-shapes/train`, `tiny-shapes/test`, or a UTF-8 `.txt` file with one prompt a line. Blank lines are
            skipped, surrounding white space is dropped, and repeated lines stay (they weigh more).
        max_samples: keep only this many, from the front; None keeps all.

    Returns:
        At least one prompt, in the order of the source.

    Raises:
        PromptError: no such source, unreadable, or without a prompt.
    """
    if max_samples is not None and max_samples < 1:
        raise PromptError(f"expected at least 1 prompt to keep, got max_samples = {max_samples}")
    if spec == "tiny-shapes/train":
        prompts = scenes.prompts("train")
    elif spec == "tiny-shapes/test":
        prompts = scenes.prompts("test")
    else:
        prompts = _read_text_file(spec)
    return prompts[:max_samples]


def _read_text_file(spec: str) -> list[str]:
    path = Path(spec).expanduser()
    expected = "expected `tiny-shapes/train`, `tiny-shapes/test` or a .txt file with one prompt a line"
    if path.is_dir():
        raise PromptError(f"prompts '{spec}': {expected}, got a folder; give the path of the file in it")
    if not path.exists():
        raise PromptError(f"prompts '{spec}': {expected}; no such file (looked for it from {Path.cwd()})")
    if path.suffix.lower() != ".txt":
        raise PromptError(f"prompts '{spec}': {expected}, got a file ending in '{path.suffix}'")
    try:
        # Windows editors put a byte order mark in front, which must not become part of the first prompt.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"prompts '{spec}': expected UTF-8, got byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "save the file as UTF-8"
        ) from error
    except OSError as error:
        raise PromptError(f"prompts '{spec}': cannot be read: {error.strerror}") from error
    # Not `splitlines`: that also cuts at rarer characters, such as a form feed, that are no ends of lines here.
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise PromptError(f"prompts '{spec}': the file holds no prompt; write one a line")
    return prompts


class PromptSampler:
    """Which prompts a step uses, as a pure function of the step: a resumed run needs no stored position.

    The prompts are dealt out without gaps from one endless row of epochs; each epoch is a permutation of all prompts
    that depends on the seed and the epoch's number only. A step of n prompts in each of P processes takes the next
    n * P prompts of the row, process p the p-th n of them: the same global batch for every P.

    Args:
        prompts: at least one.
        seed: of the permutations.

    Raises:
        PromptError: no prompts.
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        if not prompts:
            raise PromptError("expected at least one prompt to sample from, got none")
        self.prompts = list(prompts)
        self.seed = seed
        self._last_permutation: tuple[int, list[int]] = (-1, [])

    def sample(self, step: int, num_prompts: int, process_index: int = 0, num_processes: int = 1) -> list[str]:
        """The prompts of one process in one step.

        Args:
            step: from 0. All steps of a run must use the same `num_prompts * num_processes`, else prompts repeat.
            num_prompts: per process.
            process_index: 0 .. num_processes - 1.
            num_processes: number of processes.

        Returns:
            `num_prompts` prompts. Positions of different processes and steps never overlap within an epoch.

        Raises:
            ValueError: an argument out of its range.
        """
        if step < 0 or num_prompts < 1 or num_processes < 1 or not 0 <= process_index < num_processes:
            raise ValueError(
                "expected step >= 0, num_prompts >= 1 and 0 <= process_index < num_processes, got "
                f"step={step}, num_prompts={num_prompts}, process_index={process_index}, num_processes={num_processes}"
            )
        start = (step * num_processes + process_index) * num_prompts
        return [self.prompts[self._index_at(position)] for position in range(start, start + num_prompts)]

    def _index_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.prompts))
        if self._last_permutation[0] != epoch:
            # A generator of its own, seeded by text: touches no global state and mixes seed and epoch well.
            shuffled = list(range(len(self.prompts)))
            random.Random(f"prompts/{self.seed}/{epoch}").shuffle(shuffled)
            self._last_permutation = (epoch, shuffled)
        return self._last_permutation[1][offset]
