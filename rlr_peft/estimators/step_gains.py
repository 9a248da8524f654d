"""The variance of every step's terms, from the gains that a calibration shows and the sizes that all updates show."""

from dataclasses import dataclass

import torch

from rlr_peft.estimators.signal_sizes import SignalSizes
from rlr_peft.estimators.step_gradients import StepGradients, StepVariances, step_variances


@dataclass(frozen=True)
class StepGains:
    """What a calibration says of the steps themselves, all (T,), float64, at index t - 1.

    Attributes:
        first_order: V_G(t) on the calibration's own samples; infinite without a reward gradient.
        cotangents: ``E |c_t|^2`` on the same samples, so that ``first_order / cotangents`` is the gain of a pathwise
            gradient; ones without a reward gradient.
        scores: ``E |S_t|^2``, S_t being the gradient of ``< eps_t / sigma_t, mu_t >``; infinite where a step has no
            noise.
    """

    first_order: torch.Tensor
    cotangents: torch.Tensor
    scores: torch.Tensor

    def blend(self, newer: "StepGains", decay: float) -> "StepGains":
        """Running mean: ``decay`` times this plus ``1 - decay`` times the newer measurement."""
        return StepGains(
            _blend(self.first_order, newer.first_order, decay),
            _blend(self.cotangents, newer.cotangents, decay),
            _blend(self.scores, newer.scores, decay),
        )

    def variances(self, sizes: SignalSizes) -> StepVariances:
        """``V_G(t) = gain E |c_t|^2`` and ``V_H(t) = E A^2 E |S_t|^2``, taking size and gain as independent."""
        seen = sizes.mean_squared_cotangents(len(self.scores))
        scale = torch.where(seen.isnan() | (self.cotangents <= 0), 1.0, seen / self.cotangents)
        return StepVariances(
            first_order=self.first_order * scale,
            half_order=torch.where(self.scores.isinf(), torch.inf, self.scores * sizes.mean_squared_advantage()),
        )


def step_gains(gradients: StepGradients) -> StepGains:
    """The gains that N samples show."""
    squares = gradients.scores.double().square().sum(2).mean(1)
    cotangents = gradients.cotangent_squares
    return StepGains(
        first_order=step_variances(gradients).first_order,
        cotangents=torch.ones_like(squares) if cotangents is None else cotangents.mean(1),
        scores=torch.where(gradients.has_noise, squares, torch.inf),
    )


def calibration_sizes(gradients: StepGradients) -> SignalSizes:
    """Sizes of the samples of a calibration."""
    squares = gradients.cotangent_squares
    return SignalSizes.of_walk(gradients.advantages, [] if squares is None else squares.sum(1).tolist())


def _blend(older: torch.Tensor, newer: torch.Tensor, decay: float) -> torch.Tensor:
    return torch.where(newer.isinf() | older.isinf(), newer, decay * older + (1 - decay) * newer)
