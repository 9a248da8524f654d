"""``ho_window auto``: the stage of the chain that moves the reward most gets the half-order blocks.

Source: arXiv:2502.00639 aims half-order starts at the deficient scale by hand. Here the scale is measured: the energy
of a step is the mean squared norm of single samples' gradients through it, and the stage with the largest share of the
summed energy is taken. It says where the parameters move the reward, noise included; it is a proxy of "deficient",
because nothing measured here knows what the images lack.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from rlr_peft.estimators.half_order import StageWindow
from rlr_peft.estimators.rlr_settings import RLRSettings
from rlr_peft.estimators.step_gradients import StepGradients


def step_energies(gradients: StepGradients) -> torch.Tensor:
    """Mean squared norm of the samples' gradients at index t - 1, (T,), float64.

    The pathwise gradients where the reward has one: score terms are mostly noise, largest where steps are quietest.
    """
    vectors = gradients.half_order if gradients.pathwise is None else gradients.pathwise
    return vectors.double().square().sum(2).mean(1)


def choose_stage(stages: Sequence[StageWindow], energies: torch.Tensor, covered_tail: int) -> StageWindow:
    """The stage with the largest share of the energy among those that reach beyond the covered tail.

    Args:
        stages: of the chain.
        energies: at index t - 1, (T,).
        covered_tail: these last steps need no half order: K, or the black-box tail of a reward without gradient.
    """
    possible = [stage for stage in stages if stage.last > covered_tail]
    return max(possible or stages, key=lambda stage: float(energies[stage.first - 1 : stage.last].sum()))


def has_measured_window(settings: RLRSettings) -> bool:
    """Whether the window of the half-order starts is chosen by measurement."""
    return settings.half_order is not None and bool(settings.half_order.stage_windows)


def with_measured_window(settings: RLRSettings, energies: torch.Tensor | None, covered_tail: int) -> RLRSettings:
    """The settings with the window of the chosen stage, where it is measured; see ``choose_stage``.

    Raises:
        RuntimeError: nothing has been measured yet.
    """
    half_order = settings.half_order
    if half_order is None or not half_order.stage_windows:
        return settings
    if energies is None:
        raise RuntimeError("Expected calibrate() before the first update with ho_window auto.")
    stage = choose_stage(half_order.stage_windows, energies, covered_tail)
    return replace(settings, half_order=replace(half_order, window=(stage.first, stage.last)))
