"""The perturbation: undone, seeded, and the directional derivative for a small one."""

import torch

from rlr_peft.estimators import Coefficients, HalfOrder, RLREstimator, RLRSettings, ZerothOrder
from rlr_peft.testing import LinearGaussianChain, QuadraticReward
from tests.estimators.chains import gradient_of, rollout_of


def test_perturbation_is_undone_and_seeded() -> None:
    chain = LinearGaussianChain()
    before = [parameter.detach().clone() for parameter in chain.parameters]
    estimator = RLREstimator(RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.5, samples=2)))
    gradients = []
    for _ in range(2):
        estimator.accumulate(chain, QuadraticReward(chain), *rollout_of(chain, 8, 4), torch.Generator().manual_seed(3))
        gradients.append(gradient_of(chain))
        assert all(torch.equal(a, b) for a, b in zip(chain.parameters, before, strict=True))
    assert torch.equal(*gradients)


def test_two_point_differences_on_all_steps_are_the_directional_derivative() -> None:
    """With the same noises the perturbed rewards differ by the pathwise derivative along u."""
    chain = LinearGaussianChain()
    rollout, advantages = rollout_of(chain, 16, 4)
    RLREstimator(RLRSettings(6, None)).accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator())
    exact = gradient_of(chain)
    for coefficient in (1.0, 0.5):
        coefficients = Coefficients(zeroth_order=coefficient)
        zeroth = RLREstimator(RLRSettings(0, None, ZerothOrder("two-point", 1e-4), coefficients=coefficients))
        zeroth.accumulate(chain, QuadraticReward(chain), rollout, advantages, torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(5)
        direction = torch.cat([torch.randn(p.shape, generator=generator).flatten() for p in chain.parameters]).double()
        expected = coefficient * direction * (exact @ direction)
        torch.testing.assert_close(gradient_of(chain), expected, rtol=1e-5, atol=1e-5)
