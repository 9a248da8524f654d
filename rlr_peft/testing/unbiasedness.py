"""Measures an estimator's bias on the linear-Gaussian chain: mean of many estimates against the exact gradient."""

import math
from dataclasses import dataclass

import torch
from scipy.stats import norm

from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.plan import RLRSettings
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.testing.linear_gaussian_chain import LinearGaussianChain, QuadraticReward


@dataclass(frozen=True)
class EstimatorBias:
    """Comparison of an estimator's mean with the exact gradient.

    Attributes:
        max_abs_z: largest |z| over the components of the gradient.
        projection: mean estimate projected on the exact gradient, relative to it; 1 without bias.
        variance: trace of the covariance of one group's estimate of the mean reward's gradient.
        estimates: number of independent estimates.
        coverage_complete: whether the estimator says that it covers every step with weight 1.
    """

    max_abs_z: float
    projection: float
    variance: float
    estimates: int
    coverage_complete: bool


def critical_z(comparisons: int, confidence: float) -> float:
    """Two-sided critical |z| that all comparisons together exceed by chance with probability ``1 - confidence``."""
    return float(norm.ppf(1 - (1 - confidence) / (2 * comparisons)))


def measure_bias(
    settings: RLRSettings,
    *,
    num_steps: int = 6,
    group_size: int = 4,
    replicates: int = 400,
    calls: int = 300,
    differentiable: bool = True,
    last_std: float = 0.0,
    seed: int = 0,
) -> EstimatorBias:
    """Runs the estimator ``calls`` times on ``replicates`` groups each.

    The mean over one call's replicates is one estimate, because random blocks are drawn once per call.

    Args:
        settings: the estimator.
        num_steps: T of the chain.
        group_size: samples per group (one prompt).
        replicates: groups per call; must be 1 with a zeroth-order term, whose perturbation serves the whole batch.
        calls: independent estimates.
        differentiable: whether the estimator may use the reward's gradient.
        last_std: sigma_1 of the chain.
        seed: of all random numbers.
    """
    chain = LinearGaussianChain(num_steps=num_steps, replicates=replicates, last_std=last_std)
    objective = QuadraticReward(chain, differentiable)
    estimator = RLREstimator(settings)
    generator = torch.Generator().manual_seed(seed)
    if estimator.needs_calibration:
        calibration = LinearGaussianChain(num_steps=num_steps, replicates=1, last_std=last_std)
        measured = _rollout(calibration, QuadraticReward(calibration, differentiable), 64, group_size, generator)
        estimator.calibrate(calibration, [measured], decay=0.0)
    estimates = []
    complete = True
    for _ in range(calls):
        rollout = _rollout(chain, objective, replicates * group_size, group_size, generator)
        report = estimator.accumulate(chain, objective, rollout, generator)
        complete = complete and report.plan.coverage.complete
        estimator.remember(report.block_norms)
        estimates.append(_gradients_by_replicate(chain) / group_size)
    return _compare(torch.stack(estimates), torch.cat([g.flatten() for g in chain.exact_gradient()]), complete)


def _rollout(
    chain: LinearGaussianChain, objective: QuadraticReward, samples: int, group_size: int, generator: torch.Generator
) -> Rollout:
    seeds = torch.randint(2**62, (samples,), generator=generator).tolist()
    trajectory = chain.sample([""] * samples, seeds)
    rewards, gradient = objective.score_with_gradient(trajectory.latents[0], trajectory.prompts)
    return Rollout(
        trajectory, rewards, leave_one_out(rewards, group_size), gradient if objective.differentiable else None
    )


def _gradients_by_replicate(chain: LinearGaussianChain) -> torch.Tensor:
    gradients = []
    for parameter in chain.parameters:
        assert parameter.grad is not None
        gradients.append(parameter.grad.reshape(chain.replicates, -1))
        parameter.grad = None
    return torch.cat(gradients, dim=1)


def _compare(estimates: torch.Tensor, exact: torch.Tensor, complete: bool) -> EstimatorBias:
    """``estimates`` is (calls, replicates, components)."""
    by_call = estimates.mean(dim=1)
    mean, standard_error = by_call.mean(0), by_call.std(0) / math.sqrt(len(by_call))
    return EstimatorBias(
        max_abs_z=float(((mean - exact) / standard_error).abs().max()),
        projection=float(mean @ exact / (exact @ exact)),
        variance=float(estimates.flatten(0, 1).var(dim=0).sum()),
        estimates=len(by_call),
        coverage_complete=complete,
    )
