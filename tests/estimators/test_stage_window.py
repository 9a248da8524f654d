"""Windows by stage: the measured one is where the gradient is, and coverage says what it leaves out."""

from dataclasses import replace

import pytest
import torch

from rlr_peft.config import RLRArguments
from rlr_peft.estimators import (
    RLREstimator,
    RunShape,
    StageWindow,
    StepGradients,
    build_estimator,
    choose_stage,
    step_energies,
)
from rlr_peft.prompt import make_stages
from rlr_peft.testing import LinearGaussianChain
from tests.estimators.chains import rollout_of

STAGES = (StageWindow("coarse", 5, 6), StageWindow("mid", 3, 4), StageWindow("fine", 1, 2))


def estimator_of(*window: str | int, **arguments: object) -> RLREstimator:
    values = {"fo_steps": 1, "ho_length": 1, "ho_blocks": 1, "zo": "none", **arguments}
    settings = RLRArguments(ho_start="window", ho_window=window, **values)
    estimator = build_estimator(settings, RunShape(6, make_stages()))
    assert isinstance(estimator, RLREstimator)
    return estimator


def test_the_stage_with_most_energy_beyond_the_first_order_steps() -> None:
    energies = torch.tensor([9.0, 9.0, 1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    assert choose_stage(STAGES, energies, 0).name == "fine"
    assert choose_stage(STAGES, energies, 1).name == "fine"  # step 2 is still left to the half order
    assert choose_stage(STAGES, energies, 2).name == "coarse"
    assert choose_stage(STAGES, energies, 6).name == "fine"  # nothing is left: any will do


def test_energies_are_mean_squared_norms_of_the_samples() -> None:
    pathwise = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]])
    gradients = StepGradients(pathwise, torch.ones(2, 2, 2), torch.tensor([1.0, -2.0]), torch.tensor([False, True]))
    assert step_energies(gradients).tolist() == [12.5, 2.5]
    without = StepGradients(None, gradients.scores, gradients.advantages, gradients.has_noise)
    assert step_energies(without).tolist() == [5.0, 5.0]  # (1 * 2 + 4 * 2) / 2


@pytest.mark.parametrize(
    ("window", "steps", "words"),
    [
        (("mid",), {3, 4}, "steps 2, 5-6 of 6 are left out, outside the chosen window"),
        (("coarse", "mid"), {3, 4, 5, 6}, "step 2 of 6 is left out, outside the chosen window"),
        ((2, 3), {2, 3}, "steps 4-6 of 6 are left out, outside the chosen window"),
    ],
)
def test_a_given_window_is_all_that_half_order_covers(
    window: tuple[str | int, ...], steps: set[int], words: str
) -> None:
    chain = LinearGaussianChain(num_steps=6)
    layout = estimator_of(*window).layout(chain, True)
    assert {t for t in range(2, 7) if layout.coverage.weights[t - 1] > 0} == steps
    assert f"The gradient is biased: {words}" in layout.coverage.describe()


def test_the_measured_window_follows_the_gradient() -> None:
    """Calibrated on the linear chain, the window is the stage with the largest exact share, and coverage names it."""
    chain, estimator = LinearGaussianChain(num_steps=6), estimator_of("auto")
    assert estimator.wants_calibration(True)
    with pytest.raises(RuntimeError, match="calibrate"):
        estimator.layout(chain, True)
    rollout, advantages = rollout_of(chain, 64, 2)
    estimator.calibrate(chain, [rollout], advantages, decay=0.0)
    energies = estimator.statistics.energies
    assert energies is not None and energies.shape == (6,) and (energies > 0).all()
    chosen = choose_stage(STAGES, energies, 1)
    layout = estimator.layout(chain, True)
    assert {t for t in range(2, 7) if layout.coverage.weights[t - 1] > 0} == set(
        range(max(chosen.first, 2), chosen.last + 1)
    )
    assert f"outside the chosen window (measured: stage {chosen.name})" in layout.coverage.describe()
    assert "the stage with the largest measured gradient energy" in estimator.describe()


def test_a_black_box_tail_covers_its_stages_as_first_order_steps_do() -> None:
    """A reward without gradient, most energy in the stage that the tail covers: the next best one is drawn from."""
    chain, estimator = LinearGaussianChain(num_steps=6), estimator_of("auto", black_box_steps=2)
    energies = torch.tensor([9.0, 9.0, 1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    estimator.load_state_dict(estimator.state_dict() | {"energies": energies})
    layout = estimator.layout(chain, False)
    assert {block[0] for block, _ in layout.draw(torch.Generator().manual_seed(0))[0]} <= {5, 6}
    assert "measured: stage coarse" in layout.coverage.describe()
    every_step = estimator_of("auto", black_box_steps=6)
    every_step.load_state_dict(estimator.state_dict())
    assert not every_step.layout(chain, False).blocks, "nothing is left to draw"


def test_measurements_survive_a_checkpoint() -> None:
    chain, estimator = LinearGaussianChain(num_steps=6), estimator_of("auto")
    rollout, advantages = rollout_of(chain, 8, 2)
    estimator.calibrate(chain, [rollout], advantages, decay=0.9)
    rollout, advantages = rollout_of(chain, 8, 2, seed=9)
    estimator.calibrate(chain, [rollout], advantages, decay=0.9)
    resumed = estimator_of("auto")
    resumed.load_state_dict(estimator.state_dict())
    assert resumed.statistics.energies is not None and estimator.statistics.energies is not None
    assert torch.equal(resumed.statistics.energies, estimator.statistics.energies)


def test_a_reward_without_gradient_can_choose_too() -> None:
    chain, estimator = LinearGaussianChain(num_steps=6), estimator_of("auto", black_box_steps=0)
    assert estimator.wants_calibration(False) and not estimator_of("mid").wants_calibration(False)
    rollout, advantages = rollout_of(chain, 8, 2)
    blind = replace(rollout, reward_gradient=None)
    estimator.calibrate(chain, [blind], advantages, decay=0.0)
    layout = estimator.layout(chain, False)
    assert "measured: stage" in layout.coverage.describe()
