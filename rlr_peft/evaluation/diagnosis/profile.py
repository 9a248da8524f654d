"""The chain step by step: where the gradient is, how noisy each order is there, and which steps are special."""

from dataclasses import dataclass

import torch

from rlr_peft.chain.interface import Chain
from rlr_peft.chain.path import DEAD_STEP
from rlr_peft.estimators.hot_steps import hot_among
from rlr_peft.estimators.step_gradients import StepGradients, variance_and_error
from rlr_peft.evaluation.diagnosis.evidence import Evidence
from rlr_peft.evaluation.diagnosis.sample_estimates import first_and_half_order, squared_deviations


@dataclass(frozen=True)
class Stage:
    """A third of the chain.

    Attributes:
        name: "coarse" (next to the noise), "mid" or "fine" (next to the image).
        first_step: its step nearest to the image.
        last_step: its step nearest to the noise.
        energy_share: its share of the gradient energy, in [0, 1]; None for a reward without gradient.
    """

    name: str
    first_step: int
    last_step: int
    energy_share: float | None

    @property
    def steps(self) -> range:
        """Its steps t."""
        return range(self.first_step, self.last_step + 1)


@dataclass(frozen=True)
class StepProfile:
    """What every step looks like, at index t - 1; float64.

    Attributes:
        energy: E |G_t|^2, the mean squared norm of a sample's gradient through step t, (T,); None without gradient.
        signal: |E G_t|^2 with its noise bias taken off, at least 0, (T,); None without gradient.
        first_order: V_G(t) and its standard error, (2, T); None without gradient.
        half_order: V_H(t) and its standard error, (2, T); zeros where a step has no noise.
        black_box: the same of the black-box tail's terms, for the steps tried, (2, n); zeros where a step has no noise.
        has_noise: whether step t has a score term, (T,), bool.
        by_first_order_steps: variance of the whole estimate with K = 0..T and its standard error, (2, T + 1), infinite
            where a step beyond K has no noise; None without gradient.
        hot_steps: ``|d mean / d output| / std`` of the steps whose mean reacts too strongly for a score term.
        last_step_sensitivity: ``|d x_0 / d output|`` of the last step.
        stages: coarse, mid and fine.
    """

    energy: torch.Tensor | None
    signal: torch.Tensor | None
    first_order: torch.Tensor | None
    half_order: torch.Tensor
    black_box: torch.Tensor
    has_noise: torch.Tensor
    by_first_order_steps: torch.Tensor | None
    hot_steps: dict[int, float]
    last_step_sensitivity: float
    stages: list[Stage]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.has_noise)

    @property
    def last_step_is_dead(self) -> bool:
        """Whether the last step hardly reacts to the denoiser."""
        return self.last_step_sensitivity < DEAD_STEP


def profile_of(chain: Chain, evidence: Evidence) -> StepProfile:
    """Everything that is known by step."""
    gradients, num_steps = evidence.gradients, evidence.num_steps
    energy = signal = first_order = None
    if gradients.pathwise is not None:
        first_order = _variances(gradients.pathwise)
        energy = gradients.pathwise.double().square().sum(2).mean(1)
        mean_square = gradients.pathwise.double().mean(1).square().sum(1)
        signal = (mean_square - first_order[0] / evidence.num_samples).clamp(min=0)
    return StepProfile(
        energy=energy,
        signal=signal,
        first_order=first_order,
        half_order=_variances(gradients.half_order),
        black_box=_variances(evidence.mirrored[:, :, None] * gradients.scores[: len(evidence.mirrored)]),
        has_noise=gradients.has_noise,
        by_first_order_steps=None if gradients.pathwise is None else _by_first_order_steps(gradients),
        hot_steps=hot_among(chain, evidence.noisy_steps),
        last_step_sensitivity=chain.output_sensitivity(1),
        stages=stages_of(num_steps, energy),
    )


def stages_of(num_steps: int, energy: torch.Tensor | None) -> list[Stage]:
    """The thirds of a chain of T steps, coarse first; a chain of fewer than three steps has fewer stages."""
    bounds = [round(num_steps * i / 3) for i in range(4)]
    stages = []
    for name, low, high in zip(("fine", "mid", "coarse"), bounds[:-1], bounds[1:], strict=True):
        if high > low:
            share = None if energy is None else float(energy[low:high].sum() / energy.sum())
            stages.append(Stage(name, low + 1, high, share))
    return stages[::-1]


def squares_by_first_order_steps(gradients: StepGradients) -> list[torch.Tensor | None]:
    """Squared deviations (N,) of the whole estimate for K = 0..T; None where a step beyond K has no noise."""
    return [
        squared_deviations(first_and_half_order(gradients, k)) if bool(gradients.has_noise[k:].all()) else None
        for k in range(len(gradients.scores) + 1)
    ]


def _by_first_order_steps(gradients: StepGradients) -> torch.Tensor:
    columns = []
    for squares in squares_by_first_order_steps(gradients):
        if squares is None:
            columns.append(torch.tensor([torch.inf, torch.inf], dtype=torch.float64))
        else:
            columns.append(torch.stack([squares.mean(), squares.std() / len(squares) ** 0.5]))
    return torch.stack(columns, dim=1)


def _variances(steps: torch.Tensor) -> torch.Tensor:
    """(T, N, d) to (2, T)."""
    pairs = [torch.stack(variance_and_error(step)) for step in steps]
    return torch.stack(pairs, dim=1) if pairs else torch.zeros(2, 0, dtype=torch.float64)
