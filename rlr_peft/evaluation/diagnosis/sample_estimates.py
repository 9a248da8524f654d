"""The gradient estimates that single samples give to a method, put together from the sketches of their steps.

Estimates of different methods on the same samples differ by the methods alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlr_peft.estimators.variance import StepGradients


@dataclass(frozen=True)
class SampleEstimates:
    """What n samples, each on its own, estimate the gradient to be.

    Attributes:
        vectors: sketches of the estimates, (n, d).
        squares: squared distances from their mean, times n / (n - 1), (n,), float64: their mean is the variance. Where
            a method draws steps at random, the variance over all possible draws is inside.
        samples: which of all samples these are.
    """

    vectors: torch.Tensor
    squares: torch.Tensor
    samples: list[int]

    @property
    def variance(self) -> float:
        """Trace of the covariance of a single sample's estimate."""
        return float(self.squares.mean())

    @property
    def variance_error(self) -> float:
        """Standard error of the variance."""
        return float(self.squares.std()) / len(self.squares) ** 0.5


def sample_estimates(vectors: torch.Tensor, samples: Sequence[int] | None = None) -> SampleEstimates:
    """Of estimates (n, d) that hold all randomness already; ``samples`` is 0..n - 1 by default."""
    return SampleEstimates(
        vectors, squared_deviations(vectors), list(range(len(vectors)) if samples is None else samples)
    )


def squared_deviations(vectors: torch.Tensor) -> torch.Tensor:
    """Squared distances of the rows of (n, d) from their mean, times n / (n - 1), (n,), float64."""
    count, exact = len(vectors), vectors.double()
    return (exact - exact.mean(0)).square().sum(1) * count / (count - 1)


def pathwise_tail(gradients: StepGradients, first_order_steps: int) -> torch.Tensor:
    """Truncated backpropagation through the last K steps, (N, d); the whole of it for K = T.

    Raises:
        ValueError: the reward has no gradient.
    """
    if gradients.pathwise is None:
        raise ValueError("Expected a reward with a gradient.")
    return gradients.pathwise[:first_order_steps].sum(0)


def score_terms(gradients: StepGradients, advantages: torch.Tensor, beyond: int = 0) -> torch.Tensor:
    """Score terms of the steps beyond the given one, (N, d); steps without noise give nothing."""
    return advantages.float()[:, None] * gradients.scores[beyond:].sum(0)


def first_and_half_order(gradients: StepGradients, first_order_steps: int) -> torch.Tensor:
    """Pathwise up to K, single-step score terms beyond, (N, d)."""
    beyond = score_terms(gradients, gradients.advantages, first_order_steps)
    return beyond + pathwise_tail(gradients, first_order_steps) if first_order_steps else beyond


def mixed_orders(gradients: StepGradients, weights: torch.Tensor) -> torch.Tensor:
    """``sum_t w_t G_t + (1 - w_t) H_t``, (N, d).

    Args:
        gradients: must hold the pathwise gradients.
        weights: w_t at index t - 1, (T,).
    """
    if gradients.pathwise is None:
        raise ValueError("Expected a reward with a gradient.")
    share = weights.float()[:, None, None]
    return (share * gradients.pathwise + (1 - share) * gradients.half_order).sum(0)


def black_box_tail(gradients: StepGradients, mirrored: torch.Tensor) -> torch.Tensor:
    """Score terms with mirrored advantages on steps 1..n and leave-one-out advantages beyond, (N, d).

    Args:
        gradients: of the samples.
        mirrored: advantages by step, (n, N).
    """
    tail = (mirrored[:, :, None] * gradients.scores[: len(mirrored)]).sum(0)
    return tail + score_terms(gradients, gradients.advantages, len(mirrored))


def drawn_score_terms(
    gradients: StepGradients, first_order_steps: int, num_draws: int, generator: torch.Generator
) -> SampleEstimates:
    """Pathwise up to K, and M different steps with noise drawn evenly from those beyond, with weight n / M.

    The vectors hold one draw for every sample; the variance is exact over all draws: that of sampling M of n steps
    without replacement, ``n^2 (1 / M - 1 / n) s^2`` with s^2 the variance among the sample's own steps.

    Args:
        gradients: of the samples.
        first_order_steps: K; 0 for a reward without gradient.
        num_draws: M, fewer than the steps with noise beyond K.
        generator: of the draws.
    """
    beyond = gradients.half_order[first_order_steps:][gradients.has_noise[first_order_steps:]]
    count = len(beyond)
    tail = pathwise_tail(gradients, first_order_steps) if first_order_steps else torch.zeros_like(beyond[0])
    spread = (beyond.double() - beyond.double().mean(0)).square().sum((0, 2)) / (count - 1)
    draw_variance = count**2 * (1 / num_draws - 1 / count) * spread
    drawn = torch.stack([torch.randperm(count, generator=generator)[:num_draws] for _ in range(beyond.shape[1])])
    chosen = torch.stack([beyond[steps, i].sum(0) for i, steps in enumerate(drawn)])
    return SampleEstimates(
        vectors=tail + count / num_draws * chosen,
        squares=squared_deviations(first_and_half_order(gradients, first_order_steps)) + draw_variance,
        samples=list(range(beyond.shape[1])),
    )
