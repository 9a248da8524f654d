"""The order in which training uses prompts: a pure function of the step."""

import random
from collections.abc import Sequence
from typing import Protocol

from rlr_peft.prompts.errors import PromptError


class Sampler(Protocol):
    """Which prompts a step uses, as a pure function of the step: a resumed run needs no stored position."""

    def sample(self, step: int, num_prompts: int, process_index: int = 0, num_processes: int = 1) -> list[str]:
        """The prompts of one process in one step; see ``PromptSampler.sample``."""


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
        places = positions(step, num_prompts, process_index, num_processes)
        return [self.prompts[self._index_at(position)] for position in places]

    def _index_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.prompts))
        if self._last_permutation[0] != epoch:
            self._last_permutation = (epoch, permutation(len(self.prompts), f"prompts/{self.seed}/{epoch}"))
        return self._last_permutation[1][offset]


def positions(step: int, num_prompts: int, process_index: int, num_processes: int) -> range:
    """Where in the endless row of prompts the share of one process in one step lies.

    Raises:
        ValueError: an argument out of its range.
    """
    if step < 0 or num_prompts < 1 or num_processes < 1 or not 0 <= process_index < num_processes:
        raise ValueError(
            "expected step >= 0, num_prompts >= 1 and 0 <= process_index < num_processes, got "
            f"step={step}, num_prompts={num_prompts}, process_index={process_index}, num_processes={num_processes}"
        )
    start = (step * num_processes + process_index) * num_prompts
    return range(start, start + num_prompts)


def permutation(length: int, key: str) -> list[int]:
    """A shuffled 0, ..., length - 1; the same for the same key."""
    # A generator of its own, seeded by text: touches no global state and mixes the parts of the key well.
    shuffled = list(range(length))
    random.Random(key).shuffle(shuffled)
    return shuffled
