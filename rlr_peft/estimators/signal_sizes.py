"""How large advantages and pathwise cotangents are: seen in every update, for free.

The variance of a step's term is the size of what is pulled back through the step times the step's gain. Gains hardly
differ between samples, so a few of a calibration show them. Sizes do differ: where early steps are chaotic, one sample
in a hundred has a cotangent larger than all others by orders of magnitude and makes up the variance, and where a reward
is nearly satisfied, few samples have an advantage at all. A calibration mostly misses them; the updates do not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlr_peft.chain.adjoint import Segment


@dataclass
class SignalSizes:
    """Sums over samples.

    Attributes:
        samples: how many.
        advantages: of squared advantages.
        cotangents: of the squared norms of the reward's derivative at the mean of step t, at index t - 1, as far as the
            samples were walked.
        first_cotangents: the same at step 1, of those samples that were walked as far as step t.
    """

    samples: float = 0.0
    advantages: float = 0.0
    cotangents: list[float] = field(default_factory=list)
    first_cotangents: list[float] = field(default_factory=list)

    @classmethod
    def of_walk(cls, advantages: torch.Tensor, cotangents: list[float]) -> "SignalSizes":
        """Of samples with these advantages (B,) that were walked together; summed squares from step 1 on."""
        return cls(
            samples=len(advantages),
            advantages=float(advantages.double().square().sum()),
            cotangents=cotangents,
            first_cotangents=cotangents[:1] * len(cotangents),
        )

    def blend(self, newer: Iterable["SignalSizes"], decay: float) -> "SignalSizes":
        """``decay`` times this plus all of the newer ones, whose walks may differ in length."""
        blended = SignalSizes(
            decay * self.samples,
            decay * self.advantages,
            [decay * square for square in self.cotangents],
            [decay * square for square in self.first_cotangents],
        )
        for sizes in newer:
            blended.samples += sizes.samples
            blended.advantages += sizes.advantages
            _add(blended.cotangents, sizes.cotangents)
            _add(blended.first_cotangents, sizes.first_cotangents)
        return blended

    def mean_squared_advantage(self) -> float:
        """``E A^2``."""
        return self.advantages / self.samples

    def mean_squared_cotangents(self, num_steps: int) -> torch.Tensor:
        """``E |c_t|^2`` at index t - 1, (T,), float64; nan where no sample was walked so far.

        ``E |c_1|^2`` of all samples times the amplification ``E |c_t|^2 / E |c_1|^2`` of those that were walked: steps
        beyond the present K keep their place while the reward, and with it all cotangents, changes.
        """
        first = self.cotangents[0] / self.samples if self.cotangents else 0.0
        known = [
            first * square / first_square if first_square > 0 else 0.0
            for square, first_square in zip(self.cotangents, self.first_cotangents, strict=True)
        ]
        return torch.tensor(known + [torch.nan] * (num_steps - len(known)), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {**vars(self), "cotangents": list(self.cotangents), "first_cotangents": list(self.first_cotangents)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "SignalSizes":
        """What ``state_dict`` returned."""
        return cls(**state)


def watched(segment: Segment, squares: list[float]) -> Segment:
    """The same segment, whose walk appends the summed squared norm of the samples' cotangents at every step."""
    into_parameters = segment.into_parameters

    def watch(t: int, mean: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        squares.append(float(cotangent.double().square().sum()))
        return cotangent if into_parameters is None else into_parameters(t, mean, cotangent)

    return replace(segment, into_parameters=watch)


def _add(sums: list[float], more: list[float]) -> None:
    sums += [0.0] * (len(more) - len(sums))
    for i, value in enumerate(more):
        sums[i] += value
