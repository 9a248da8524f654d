"""The roulette tail: every sample is walked back a random number of steps, and what is walked counts for the rest.

``sum_t 1[K >= t] / q_t G_t`` with ``q_t = P(K >= t)`` has the expectation of full backpropagation, ``sum_t G_t``, at
the price of ``E[K] = sum_t q_t`` steps (Russian roulette; for optimisation Beatson and Adams, ICML 2019). With
``R_t = G_t + G_{t+1} + ...`` its second moment is

    E |g|^2 = sum_t beta_t / q_t,        beta_t = E |R_t|^2 - E |R_{t+1}|^2

so that measured gradients tell the best q.
"""

import torch
from scipy.optimize import isotonic_regression

from rlr_peft.estimators.step_gradients import GradientMoments

# No step is walked more rarely: weights stay below 1 / this where few measured samples showed nothing.
SMALLEST_PROBABILITY = 0.05
# Factors of sqrt(beta) that are tried; q_t is at most 1.
FACTORS = torch.logspace(-3, 3, 601, dtype=torch.float64)
# A walked step is replayed once and pulled back once, a backward pass counting as two forward ones.
STEP_COST = 3.0


def roulette_weights(probabilities: torch.Tensor, samples: int, generator: torch.Generator) -> torch.Tensor:
    """``1[K_i >= t] / q_t`` of every sample at every step.

    The draws are stratified: a sample of random rank r is walked to step t if ``(r + u) / B < q_t``, one u for all.

    Args:
        probabilities: q_t at index t - 1, in (0, 1], not increasing, q_1 = 1; (T,).
        samples: B.
        generator: of the draws, on the CPU.

    Returns:
        (T, B), float64.
    """
    ranks = torch.randperm(samples, generator=generator).double()
    places = (ranks + torch.rand((), generator=generator, dtype=torch.float64)) / samples
    probabilities = probabilities.double()[:, None]
    return (places < probabilities) / probabilities


def roulette_probabilities(moments: GradientMoments, samples: int, fixed_cost: float) -> torch.Tensor:
    """The q_t that minimise ``sqrt(E |mean of B g|^2) * cost``: the most improvement per cost, see ``auto``.

    Args:
        moments: of the gradients G_1..G_T.
        samples: B, of an update.
        fixed_cost: of a sample without its walk, in denoiser evaluations.

    Returns:
        (T,), float64, in [SMALLEST_PROBABILITY, 1], not increasing, 1 at step 1.
    """
    beta = moments.products.diagonal() + 2 * moments.products.triu(1).sum(1)
    # Steps whose beta rises with t cannot be told apart by a q that does not: they share the mean of theirs.
    pooled = torch.tensor(isotonic_regression(beta.numpy(), increasing=False).x.copy()).clamp(min=0)
    candidates = (FACTORS[:, None] * pooled.sqrt()).clamp(SMALLEST_PROBABILITY, 1)
    candidates[:, 0] = 1
    single = (pooled / candidates).sum(1)
    expected = moments.means.sum().clamp(min=0)
    squares = expected + (single - expected).clamp(min=0) / samples
    costs = fixed_cost + STEP_COST * candidates.sum(1)
    return candidates[int((squares.sqrt() * costs).argmin())]
