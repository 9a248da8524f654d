"""The order in which training uses prompts: a pure function of the step, of lists or of a stream."""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from rlr_peft.prompt import Prompt, PromptError


class Sampler(ABC):
    """Which prompts a step uses, as a pure function of the step: a resumed run needs no stored position.

    Prompts are dealt out without gaps from one endless row. A step of n prompts in each of P processes takes the next
    n * P prompts of the row, process p the p-th n of them: the same global batch for every P.
    """

    def sample(self, step: int, num_prompts: int, process_index: int = 0, num_processes: int = 1) -> list[Prompt]:
        """The prompts of one process in one step.

        Args:
            step: from 0. All steps of a run must use the same `num_prompts * num_processes`, else prompts repeat.
            num_prompts: per process.
            process_index: 0 .. num_processes - 1.

        Raises:
            PromptError: a stream that is empty, or holds less than the first time.
            ValueError: an argument out of its range.
        """
        if step < 0 or num_prompts < 1 or num_processes < 1 or not 0 <= process_index < num_processes:
            raise ValueError(
                "expected step >= 0, num_prompts >= 1 and 0 <= process_index < num_processes, got "
                f"step={step}, num_prompts={num_prompts}, process_index={process_index}, num_processes={num_processes}"
            )
        start = (step * num_processes + process_index) * num_prompts
        return [self.prompt_at(position) for position in range(start, start + num_prompts)]

    @abstractmethod
    def prompt_at(self, position: int) -> Prompt:
        """The prompt at a place, from 0, of the endless row."""


class PromptSampler(Sampler):
    """A row of epochs, each a permutation of all prompts that depends on the seed and the epoch's number only.

    Args:
        prompts: at least one.

    Raises:
        PromptError: no prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise PromptError("expected at least one prompt to sample from, got none")
        self.prompts = list(prompts)
        self.seed = seed
        self._last_permutation: tuple[int, list[int]] = (-1, [])

    def prompt_at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        if self._last_permutation[0] != epoch:
            self._last_permutation = (epoch, permutation(len(self.prompts), f"prompts/{self.seed}/{epoch}"))
        return self.prompts[self._last_permutation[1][offset]]


LONGEST_PATTERN = 1000
"""Places after which shares that are no simpler fractions repeat: they are rounded to thousandths."""


class MixedPromptSampler(Sampler):
    """Prompts of several sources, every source in its share of them.

    The row repeats a pattern of sources, spread as evenly as their shares allow (3 : 1 is A A B A),
    so that every few updates have the shares. Each source fills its places as if it were alone: no prompt of it comes
    twice before all others came once.

    Args:
        sources: at least one prompt each.
        weights: one for each source, above 0; each at least a thousandth of their sum.

    Raises:
        PromptError: a source without prompts.
    """

    def __init__(self, sources: Sequence[Sequence[Prompt]], weights: Sequence[float], seed: int) -> None:
        self._samplers = [PromptSampler(source, seed) for source in sources]
        self._pattern = pattern_of(weights)
        self._counts = [self._pattern.count(source) for source in range(len(sources))]
        self._before = [self._pattern[:place].count(source) for place, source in enumerate(self._pattern)]

    def prompt_at(self, position: int) -> Prompt:
        repetition, place = divmod(position, len(self._pattern))
        source = self._pattern[place]
        return self._samplers[source].prompt_at(repetition * self._counts[source] + self._before[place])


def pattern_of(weights: Sequence[float]) -> list[int]:
    """The numbers of the sources, each in its share of the places and as evenly spread as that allows.

    Args:
        weights: above 0, of any scale. 3 and 1 give 0, 0, 1, 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = min(LONGEST_PATTERN, math.lcm(*(share.denominator for share in shares)))
    pattern: list[int] = []
    for place in range(1, length + 1):  # whoever lacks most of what it should have by now
        lacking = [share * place - pattern.count(source) for source, share in enumerate(shares)]
        pattern.append(lacking.index(max(lacking)))
    return pattern


def permutation(length: int, key: str) -> list[int]:
    """A shuffled 0, ..., length - 1; the same for the same key."""
    # A generator of its own, seeded by text: touches no global state and mixes the parts of the key well.
    shuffled = list(range(length))
    random.Random(key).shuffle(shuffled)
    return shuffled


# Training and the calibration of the estimator read at different places.
CURSORS = 2


class StreamingPromptSampler(Sampler):
    """Shuffles a stream within consecutive windows.

    The stream is cut into windows of ``buffer_size`` prompts; each is shuffled in itself, by a permutation that depends
    on the seed, the epoch and the window's number only. (A shuffle buffer that is refilled prompt by prompt mixes a
    little better, but its contents depend on all that was read before.) Which prompts a step uses is thus a function of
    the step alone; a resumed run reads the stream again up to its place, which costs time, not exactness.

    Args:
        open_stream: starts the stream from its first prompt; it must give the same prompts every time.
        buffer_size: prompts of a window, all that is held in memory; two windows at most.
    """

    def __init__(self, open_stream: Callable[[], Iterator[Prompt]], seed: int, buffer_size: int) -> None:
        self._open = open_stream
        self._seed = seed
        self._buffer_size = buffer_size
        self._cursors: list[_Cursor] = []
        self._length: int | None = None

    def prompt_at(self, position: int) -> Prompt:
        if self._length is None and (found := self._read(0, position)) is not None:
            return found
        assert self._length is not None  # the end came first, so that it is known now
        found = self._read(*divmod(position, self._length))
        if found is None:
            raise PromptError(f"the stream of prompts held {self._length} the first time and fewer now")
        return found

    def _read(self, epoch: int, place: int) -> Prompt | None:
        """The prompt at a place of an epoch; None beyond the stream's end, which is remembered."""
        window, offset = divmod(place, self._buffer_size)
        cursor = self._cursor(window)
        while cursor.window < window and cursor.advance(self._buffer_size):
            pass
        if cursor.window < window or offset >= len(cursor.prompts):
            self._length = max(cursor.window, 0) * self._buffer_size + len(cursor.prompts)
            if self._length == 0:
                raise PromptError("the stream holds no prompt")
            return None
        order = cursor.order(f"prompts/{self._seed}/{epoch}/{window}")
        return cursor.prompts[order[offset]]

    def _cursor(self, window: int) -> "_Cursor":
        """The cursor that is nearest before the window; a new one if all are beyond it."""
        before = [cursor for cursor in self._cursors if cursor.window <= window]
        if before:
            cursor = max(before, key=lambda one: one.window)
            self._cursors.remove(cursor)
        else:
            cursor = _Cursor(self._open())
        self._cursors = [*self._cursors, cursor][-CURSORS:]
        return cursor


class _Cursor:
    """A place in the stream, with the window that was read last."""

    def __init__(self, stream: Iterator[Prompt]) -> None:
        self.window = -1
        self.prompts: list[Prompt] = []
        self._stream = stream
        self._order: tuple[str, list[int]] = ("", [])

    def advance(self, size: int) -> bool:
        """Reads the next window; False, and nothing changed, at the end."""
        prompts = list(itertools.islice(self._stream, size))
        if prompts:
            self.prompts, self.window = prompts, self.window + 1
        return bool(prompts)

    def order(self, key: str) -> list[int]:
        """The window's permutation."""
        if self._order[0] != key:
            self._order = key, permutation(len(self.prompts), key)
        return self._order[1]
