"""Measures an estimator's bias on the linear-Gaussian chain: mean of many estimates against the exact gradient."""

import math
from dataclasses import dataclass

import torch
from scipy.stats import norm

from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.base import Coverage, Estimator, Rollout
from rlr_peft.estimators.sampling import mirrored_pairs
from rlr_peft.testing.linear_gaussian_chain import LinearGaussianChain, QuadraticReward


@dataclass(frozen=True)
class EstimatorBias:
    """Comparison of an estimator's mean with the exact gradient.

    Attributes:
        max_abs_z: largest |z| over the components of the gradient.
        projection: mean estimate projected on the exact gradient, relative to it; 1 without bias.
        variance: trace of the covariance of one group's estimate of the mean reward's gradient.
        estimates: number of independent estimates.
        coverage: what the estimator says that it covers, in its last report.
    """

    max_abs_z: float
    projection: float
    variance: float
    estimates: int
    coverage: Coverage


def critical_z(comparisons: int, confidence: float) -> float:
    """Two-sided critical |z| that all comparisons together exceed by chance with probability ``1 - confidence``."""
    return float(norm.ppf(1 - (1 - confidence) / (2 * comparisons)))


def measure_bias(
    estimator: Estimator,
    *,
    num_steps: int = 6,
    group_size: int = 4,
    replicates: int = 400,
    calls: int = 300,
    differentiable: bool = True,
    last_std: float = 0.0,
    antithetic: bool = False,
    seed: int = 0,
) -> EstimatorBias:
    """Runs the estimator ``calls`` times on ``replicates`` groups each, every one with a prompt of its own.

    The mean over one call's replicates is one estimate, because random blocks are drawn once per call. The estimator
    hears of every call as it would of an update, so statistics that it keeps come from earlier calls.

    Args:
        estimator: a fresh one.
        num_steps: T of the chain.
        group_size: samples per group (one prompt).
        replicates: groups per call; must be 1 with a zeroth-order term, whose perturbation serves the whole batch.
        calls: independent estimates.
        differentiable: whether the estimator may use the reward's gradient.
        last_std: sigma_1 of the chain.
        antithetic: mirror the noises of neighbouring samples, as training does for an antithetic estimator.
        seed: of all random numbers.
    """
    chain = LinearGaussianChain(num_steps=num_steps, replicates=replicates, last_std=last_std)
    objective = QuadraticReward(chain, differentiable)
    generator = torch.Generator().manual_seed(seed)
    if estimator.wants_calibration(differentiable):
        _calibrate(estimator, group_size, differentiable, num_steps, last_std, generator)
    prompts = [f"prompt {i // group_size}" for i in range(replicates * group_size)]
    estimates = []
    for _ in range(calls):
        sampled = _sampled(chain, objective, prompts, antithetic, generator)
        advantages = estimator.advantages(sampled.rewards, prompts, group_size)
        rollout = Rollout(sampled.trajectory, sampled.rewards, advantages, sampled.reward_gradient)
        coverage = estimator.coverage(chain, differentiable)
        estimator.learn([estimator.accumulate(chain, objective, rollout, generator)])
        estimates.append(_gradients_by_replicate(chain) / group_size)
    exact = torch.cat([gradient.flatten() for gradient in chain.exact_gradient()])
    return _compare(torch.stack(estimates), exact, coverage)


def _calibrate(
    estimator: Estimator,
    group_size: int,
    differentiable: bool,
    num_steps: int,
    last_std: float,
    generator: torch.Generator,
) -> None:
    """On 64 samples of a single copy of the chain: calibration replays samples one by one."""
    chain = LinearGaussianChain(num_steps=num_steps, last_std=last_std)
    sampled = _sampled(chain, QuadraticReward(chain, differentiable), [""] * 64, False, generator)
    advantages = leave_one_out(sampled.rewards, group_size)
    rollout = Rollout(sampled.trajectory, sampled.rewards, advantages, sampled.reward_gradient)
    estimator.calibrate(chain, [rollout], decay=0.0)


def _sampled(
    chain: LinearGaussianChain,
    objective: QuadraticReward,
    prompts: list[str],
    antithetic: bool,
    generator: torch.Generator,
) -> Rollout:
    """A rollout whose advantages are still the rewards."""
    seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
    noises = mirrored_pairs(chain.draw_noises(seeds[::2])) if antithetic else None
    trajectory = chain.sample(prompts, seeds, noises)
    rewards, gradient = objective.score_with_gradient(trajectory.latents[0], prompts)
    return Rollout(trajectory, rewards, rewards, gradient if objective.differentiable else None)


def _gradients_by_replicate(chain: LinearGaussianChain) -> torch.Tensor:
    gradients = []
    for parameter in chain.parameters:
        assert parameter.grad is not None
        gradients.append(parameter.grad.reshape(chain.replicates, -1))
        parameter.grad = None
    return torch.cat(gradients, dim=1)


def _compare(estimates: torch.Tensor, exact: torch.Tensor, coverage: Coverage) -> EstimatorBias:
    """``estimates`` is (calls, replicates, components)."""
    by_call = estimates.mean(dim=1)
    mean, standard_error = by_call.mean(0), by_call.std(0) / math.sqrt(len(by_call))
    return EstimatorBias(
        max_abs_z=float(((mean - exact) / standard_error).abs().max()),
        projection=float(mean @ exact / (exact @ exact)),
        variance=float(estimates.flatten(0, 1).var(dim=0).sum()),
        estimates=len(by_call),
        coverage=coverage,
    )
