"""An estimator's bias on the linear-Gaussian chain: the mean of many estimates against the exact gradient.

``assert_unbiased(estimator)`` is for tests, ``measure_bias`` for tables.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import norm

from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.base import Coverage, Estimator
from rlr_peft.estimators.objective import Rollout, mirrored_pairs
from rlr_peft.prompt import PromptLike, as_prompts
from rlr_peft.testing.chains import LinearGaussianChain, QuadraticReward


@dataclass(frozen=True)
class EstimatorBias:
    """Comparison of an estimator's mean with the exact gradient.

    Attributes:
        exact: the gradient in closed form, (d,), float64.
        mean: of all estimates, (d,).
        standard_error: of the mean, (d,).
        max_abs_z: largest |z| over the components of the gradient.
        projection: mean estimate projected on the exact gradient, relative to it; 1 without bias.
        projection_error: its standard error.
        variance: trace of the covariance of one group's estimate of the mean reward's gradient.
        estimates: number of independent estimates.
        coverage: what the estimator says that it covers, in the end.
    """

    exact: torch.Tensor
    mean: torch.Tensor
    standard_error: torch.Tensor
    max_abs_z: float
    projection: float
    projection_error: float
    variance: float
    estimates: int
    coverage: Coverage


def assert_unbiased(
    estimator: Estimator, *, confidence: float = 0.99, resolution: float = 0.1, **options: Any
) -> EstimatorBias:
    """Fails unless the mean of many estimates is the gradient of the expected reward in closed form.

    An unbiased estimator passes with at least the probability ``confidence``; the seeds are fixed, so that the same
    estimator always gives the same answer. ::

        def test_my_estimator() -> None:
            assert_unbiased(MyEstimator())

    Args:
        confidence: in (0, 1): with which an unbiased estimator passes, all components of the gradient taken together.
        resolution: share of the gradient that a bias must not exceed; an estimator too noisy for a bias of this size to
            show fails too.
        options: of ``measure_bias``, such as ``last_std=0.2`` for an estimator that needs noise in the last step,
            ``differentiable=False`` for a reward without gradient, ``replicates=1`` for one that perturbs parameters,
            and more ``calls`` for a noisy one.

    Returns:
        What was measured.

    Raises:
        AssertionError: the estimator is biased, or too noisy to tell; with the numbers.
    """
    bias = measure_bias(estimator, **options)
    critical = critical_z(len(bias.exact), confidence)
    largest = float(norm.ppf((1 + confidence) / 2)) * bias.projection_error
    if bias.max_abs_z > critical or abs(bias.projection - 1) > resolution + largest:
        raise AssertionError(f"{type(estimator).__name__} is biased: {_numbers(bias, critical, confidence)}")
    if largest > resolution:
        raise AssertionError(
            f"{type(estimator).__name__} is too noisy to tell: its mean is known to {largest:.1%} of the gradient, "
            f"expected {resolution:.1%} or less after {bias.estimates} estimates; give more calls. "
            f"{_numbers(bias, critical, confidence)}"
        )
    return bias


def _numbers(bias: EstimatorBias, critical: float, confidence: float) -> str:
    """The component that is furthest off, and the whole."""
    scores = _z_scores(bias.mean, bias.standard_error, bias.exact)
    worst = int(scores.abs().argmax())
    mean, error, exact = (float(values[worst]) for values in (bias.mean, bias.standard_error, bias.exact))
    return (
        f"component {worst + 1} of {len(bias.exact)} is {mean:.5g} on average, {exact:.5g} in closed form: a bias of "
        f"{mean - exact:+.3g} with standard error {error:.2g}, {abs(float(scores[worst])):.1f} standard errors (an "
        f"unbiased estimator stays below {critical:.2f} in all components with probability {confidence:g}). Along the "
        f"gradient the mean is {bias.projection:.4f} ± {bias.projection_error:.4f} of it, over {bias.estimates} "
        f"independent estimates. It claims: {bias.coverage.describe()}"
    )


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
    learns from every call as it would from an update, so statistics that it keeps come from earlier calls.

    Args:
        num_steps: T of the chain.
        group_size: samples per group (one prompt).
        replicates: groups per call; must be 1 with a zeroth-order term, whose perturbation serves the whole batch.
        differentiable: whether the estimator may use the reward's gradient.
        last_std: sigma_1 of the chain.
        antithetic: mirror the noises of neighbouring samples, as training does for an antithetic estimator.
    """
    chain = LinearGaussianChain(num_steps=num_steps, replicates=replicates, last_std=last_std)
    objective = QuadraticReward(chain, differentiable)
    generator = torch.Generator().manual_seed(seed)
    if estimator.wants_calibration(differentiable):
        _calibrate(estimator, group_size, differentiable, num_steps, last_std, generator)
    texts = [f"prompt {i // group_size}" for i in range(replicates * group_size)]
    prompts = as_prompts(texts)
    estimates = []
    for _ in range(calls):
        rollout = _rollout(chain, objective, prompts, antithetic, generator)
        advantages = estimator.advantages(rollout.rewards, texts, group_size)
        estimator.learn([estimator.accumulate(chain, objective, rollout, advantages, generator)])
        estimates.append(_gradients_by_replicate(chain) / group_size)
    exact = torch.cat([gradient.flatten() for gradient in chain.exact_gradient()])
    return _compare(torch.stack(estimates), exact, estimator.coverage(chain, differentiable))


def _calibrate(
    estimator: Estimator,
    group_size: int,
    differentiable: bool,
    num_steps: int,
    last_std: float,
    generator: torch.Generator,
) -> None:
    """On 64 samples of a single copy of the chain: calibration gives each sample a copy of its own."""
    chain = LinearGaussianChain(num_steps=num_steps, last_std=last_std)
    objective = QuadraticReward(chain, differentiable)
    rollout = _rollout(chain, objective, [""] * 64, False, generator)
    estimator.calibrate(chain, [rollout], leave_one_out(rollout.rewards, group_size), decay=0.0)


def _rollout(
    chain: LinearGaussianChain,
    objective: QuadraticReward,
    prompts: Sequence[PromptLike],
    antithetic: bool,
    generator: torch.Generator,
) -> Rollout:
    seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
    noises = mirrored_pairs(chain.draw_noises(seeds[::2])) if antithetic else None
    trajectory = chain.sample(prompts, seeds, noises)
    rewards, gradient = objective.score_with_gradient(trajectory.latents[0], prompts)
    return Rollout(trajectory, rewards, gradient if objective.differentiable else None)


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
    projections = by_call @ exact / (exact @ exact)
    return EstimatorBias(
        exact=exact,
        mean=mean,
        standard_error=standard_error,
        max_abs_z=float(_z_scores(mean, standard_error, exact).abs().max()),
        projection=float(projections.mean()),
        projection_error=float(projections.std()) / math.sqrt(len(by_call)),
        variance=float(estimates.flatten(0, 1).var(dim=0).sum()),
        estimates=len(by_call),
        coverage=coverage,
    )


def _z_scores(mean: torch.Tensor, standard_error: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Deviations in standard errors; an estimate without noise is right up to rounding, or infinitely wrong."""
    rounding = 1e-12 * exact.abs().max()
    return (mean - exact) / standard_error.clamp(min=rounding)
