"""Which steps of the chain have noise in an update, where that moves from update to update."""

from dataclasses import dataclass

from rlr_peft.config import ChainArguments
from rlr_peft.reports import counted


@dataclass(frozen=True)
class MovingWindow:
    """Some neighbouring steps with noise, drawn anew for every update (Flow-GRPO-Fast) or sliding (MixGRPO 2507.21802).

    Attributes:
        first, last: the steps among which it moves, counted from the clean end.
        length: number of its steps.
        slide: updates after which it moves one step towards the clean end, from where it begins again at the noise;
            None draws it.
    """

    first: int
    last: int
    length: int
    slide: int | None

    @property
    def places(self) -> int:
        """Number of places where it may lie."""
        return self.last - self.first - self.length + 2

    def at(self, update: int, seed: int) -> tuple[int, int]:
        """First and last step with noise in an update.

        Args:
            update: those that are finished.
            seed: of the draw.
        """
        place = seed % self.places if self.slide is None else update // self.slide % self.places
        last = self.last - place
        return last - self.length + 1, last

    def shares(self) -> dict[int, float]:
        """In what share of the updates every step from ``first`` to ``last`` has noise."""
        ends = range(self.first + self.length - 1, self.last + 1)
        steps = range(self.first, self.last + 1)
        return {t: sum(end - self.length < t <= end for end in ends) / self.places for t in steps}

    def describe(self) -> str:
        """In words, what a step of it is."""
        how = "drawn for every update" if self.slide is None else f"sliding every {counted(self.slide, 'update')}"
        return f"left out in updates where it has no noise ({counted(self.length, 'step')} at a time, {how})"


def moving_window(arguments: ChainArguments) -> MovingWindow | None:
    """That of a config; None where the same steps have noise in every update."""
    if arguments.noise_steps is None or arguments.noise_window is None:
        return None
    first, last = arguments.noise_window
    return MovingWindow(first, last, arguments.noise_steps, arguments.noise_slide)
