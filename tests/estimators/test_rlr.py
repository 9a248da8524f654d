"""What the RLR estimator remembers between updates, and what it reports."""

import math
from dataclasses import replace

import pytest
import torch

from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.rlr_settings import Coefficients, RLRSettings
from rlr_peft.estimators.rlr_statistics import NORM_DECAY, RLRMemory
from rlr_peft.estimators.step_gains import StepGains
from rlr_peft.estimators.step_gradients import StepVariances
from rlr_peft.testing.chains import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import gradient_of, rollout_of

SINGLE = HalfOrder(1, "all")


def test_block_norms_of_all_micro_batches_make_one_running_mean() -> None:
    estimator = RLREstimator(RLRSettings())
    estimator.remember([RLRMemory([(2, 1.0)]), RLRMemory([(2, 3.0), (4, 5.0)])])
    estimator.remember([RLRMemory([(2, 4.0)])])
    assert estimator.state_dict()["running_norms"] == {2: pytest.approx(NORM_DECAY * 2 + (1 - NORM_DECAY) * 4), 4: 5.0}


def test_remembered_norms_are_of_unweighted_blocks() -> None:
    """A block's own gradient decides how often it is drawn; its weight 1 / q or a coefficient must not."""
    chain = LinearGaussianChain(num_steps=4)
    rollout = rollout_of(chain, 8, 4)
    all_of_them = RLREstimator(RLRSettings(1, SINGLE))
    norms = dict(all_of_them.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator()).memory.block_norms)
    assert set(norms) == {2, 3, 4}
    drawn = RLREstimator(RLRSettings(1, HalfOrder(1, 1), coefficients=Coefficients(half_order=0.1)))
    ((t, norm),) = drawn.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator()).memory.block_norms
    assert norm == pytest.approx(norms[t])


def test_the_terms_norms_and_passes_are_reported() -> None:
    chain = LinearGaussianChain(num_steps=4)
    rollout = rollout_of(chain, 8, 4)
    report = RLREstimator(RLRSettings(2, SINGLE)).accumulate(chain, QuadraticReward(chain), rollout, torch.Generator())
    assert report.first_order_steps == 2 and report.backward_steps == 4
    assert set(report.gradient_norms) == {"first_order", "half_order"}
    gradient_of(chain)
    RLREstimator(RLRSettings(2, None)).accumulate(chain, QuadraticReward(chain), rollout, torch.Generator())
    assert report.gradient_norms["first_order"] == pytest.approx(float(gradient_of(chain).norm()) / 8)
    mixed = RLREstimator(RLRSettings("auto", SINGLE, step_choice="inverse-variance"))
    mixed.step_variances = StepVariances(torch.ones(4), torch.tensor([math.inf, 1, 1, 1e-9]))
    report = mixed.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator())
    # one pass for step 1, which has weight 1, two for step 2, one for the last of the walk, and step 4's score term
    assert report.first_order_steps == 3 and report.backward_steps == 1 + 2 + 1 + 1
    assert set(report.gradient_norms) == {"mixed_order", "half_order"}
    mixed.settings = replace(mixed.settings, coefficients=Coefficients(first_order=0.5))
    report = mixed.accumulate(chain, QuadraticReward(chain), rollout, torch.Generator())
    assert report.backward_steps == 2 + 2 + 1 + 1, "a coefficient makes step 1's cotangent another one too"


def quiet_scores(num_steps: int) -> StepGains:
    ones = torch.ones(num_steps, dtype=torch.float64)
    return StepGains(ones, ones, torch.tensor([math.inf] + [1e-9] * (num_steps - 1), dtype=torch.float64))


def test_auto_needs_a_calibration() -> None:
    with pytest.raises(RuntimeError, match="calibrate"):
        RLREstimator(RLRSettings("auto")).plan(LinearGaussianChain(), True, torch.Generator())


def test_the_state_survives_a_round_trip(tmp_path) -> None:
    chain = LinearGaussianChain(num_steps=4)
    settings = RLRSettings("auto", HalfOrder(1, 2, "gradient-norm"), state_baseline=True)
    estimator = RLREstimator(settings)
    objective = QuadraticReward(chain)
    estimator.calibrate(chain, [rollout_of(chain, 16, 4)], decay=0.5)
    # quiet score terms and so K = 1: blocks are drawn, and states give a baseline
    estimator.load_state_dict(estimator.state_dict() | {"step_gains": vars(quiet_scores(4))})
    for seed in range(2):
        report = estimator.accumulate(chain, objective, rollout_of(chain, 8, 4, seed), torch.Generator())
        estimator.remember([report.memory])
    torch.save(estimator.state_dict(), tmp_path / "state.pt")
    restored = RLREstimator(settings)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert str(restored.state_dict()) == str(estimator.state_dict())
    gradients = []
    for each in (estimator, restored):
        gradient_of(chain)
        each.accumulate(chain, objective, rollout_of(chain, 8, 4, 7), torch.Generator().manual_seed(1))
        gradients.append(gradient_of(chain))
    assert torch.equal(*gradients)
    fresh = RLREstimator(settings)
    fresh.step_variances = estimator.step_variances
    fresh.accumulate(chain, objective, rollout_of(chain, 8, 4, 7), torch.Generator().manual_seed(1))
    assert not torch.equal(gradient_of(chain), gradients[0]), "what is remembered must matter"
