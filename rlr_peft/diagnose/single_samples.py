"""The gradient estimates that single samples give to a method, and what they say of its noise, signal and direction.

They are put together from the sketches of the steps: estimates of different methods on the same samples differ by the
methods alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlr_peft.estimators.auto import RowWeights, rows_of
from rlr_peft.estimators.step_gradients import StepGradients
from rlr_peft.estimators.variance import GradientMoments
from rlr_peft.reports import direction


@dataclass(frozen=True)
class SampleEstimates:
    """What n samples, each on its own, estimate the gradient to be.

    Attributes:
        vectors: sketches of the estimates, (n, d); of a method that draws steps, of one draw or averaged over all.
        squares: squared distances from their mean, times n / (n - 1), (n,), float64: their mean is the variance. Where
            a method draws steps at random, the variance over all possible draws is inside.
        samples: which of all samples these are.
        draws: which draw of the method each vector is of, (n,); those of one draw are not independent.
        shared: the part of the variance that comes from draws which all samples of a micro-batch share.
    """

    vectors: torch.Tensor
    squares: torch.Tensor
    samples: list[int]
    draws: torch.Tensor
    shared: float = 0.0

    @property
    def variance(self) -> float:
        """Trace of the covariance of a single sample's estimate."""
        return float(self.squares.mean())

    @property
    def variance_error(self) -> float:
        """Standard error of the variance."""
        return float(self.squares.std()) / len(self.squares) ** 0.5


def sample_estimates(
    vectors: torch.Tensor, samples: Sequence[int] | None = None, draws: torch.Tensor | None = None
) -> SampleEstimates:
    """Of estimates (n, d) that hold all randomness already.

    Args:
        samples: which of all samples they are of; 0..n - 1 by default.
        draws: which draw each is of, (n,), from 0 on; all different by default.
    """
    chosen = list(range(len(vectors)) if samples is None else samples)
    own = torch.arange(len(vectors)) if draws is None else draws
    together, apart = _mean_products(vectors, own)
    return SampleEstimates(vectors, squared_deviations(vectors), chosen, own, max(together - apart, 0.0))


def _mean_products(vectors: torch.Tensor, draws: torch.Tensor) -> tuple[float, float]:
    """Mean inner products of two different samples of one draw, and of two draws; the former is the latter without."""
    exact, count = vectors.double(), len(vectors)
    sums = torch.zeros(int(draws.max()) + 1, exact.shape[1], dtype=torch.float64).index_add_(0, draws, exact)
    pairs = float(torch.bincount(draws).square().sum())
    within, own = float(sums.square().sum()), float(exact.square().sum())
    apart = (float(exact.sum(0).square().sum()) - within) / (count**2 - pairs)
    return (within - own) / (pairs - count) if pairs > count else apart, apart


def weighted_rows(
    gradients: StepGradients, weights: RowWeights, factors: torch.Tensor | None = None
) -> SampleEstimates:
    """``sum_r w_r v_r`` with drawn weights of the rows of ``auto``, averaged over all draws.

    Args:
        gradients: must hold the pathwise gradients and those with the velocity held fixed.
        factors: of the samples' estimates, (N,); None for 1.
    """
    rows = rows_of(gradients).double()
    rows = rows if factors is None else factors.double()[:, None] * rows
    covariance = weights.square - torch.outer(weights.mean, weights.mean)
    used = covariance.diagonal() > 0
    drawn, covariance = rows[used], covariance[used][:, used]
    vectors = torch.einsum("r,rnd->nd", weights.mean, rows).float()
    means = GradientMoments.of(drawn).means
    return SampleEstimates(
        vectors,
        squared_deviations(vectors) + (torch.einsum("rs,snd->rnd", covariance, drawn) * drawn).sum((0, 2)),
        list(range(len(vectors))),
        torch.arange(len(vectors)),
        max(float((covariance * means).sum()), 0.0) if weights.shared else 0.0,
    )


def squared_deviations(vectors: torch.Tensor) -> torch.Tensor:
    """Squared distances of the rows of (n, d) from their mean, times n / (n - 1), (n,), float64."""
    count, exact = len(vectors), vectors.double()
    return (exact - exact.mean(0)).square().sum(1) * count / (count - 1)


def pathwise_tail(gradients: StepGradients, first_order_steps: int) -> torch.Tensor:
    """Truncated backpropagation through the last K steps, (N, d); the whole of it for K = T."""
    assert gradients.pathwise is not None  # as the reward has a gradient
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
    assert gradients.pathwise is not None  # as the reward has a gradient
    share = weights.float()[:, None, None]
    return (share * gradients.pathwise + (1 - share) * gradients.half_order).sum(0)


def black_box_tail(gradients: StepGradients, mirrored: torch.Tensor) -> torch.Tensor:
    """Score terms with mirrored advantages on steps 1..n and leave-one-out advantages beyond, (N, d).

    Args:
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
        first_order_steps: K; 0 for a reward without gradient.
        num_draws: M, fewer than the steps with noise beyond K.
    """
    beyond = gradients.half_order[first_order_steps:][gradients.has_noise[first_order_steps:]]
    count = len(beyond)
    tail = pathwise_tail(gradients, first_order_steps) if first_order_steps else torch.zeros_like(beyond[0])
    spread = (beyond.double() - beyond.double().mean(0)).square().sum((0, 2)) / (count - 1)
    factor = count**2 * (1 / num_draws - 1 / count)
    means = GradientMoments.of(beyond).means
    spread_of_means = float(means.trace() - means.sum() / count) / (count - 1)
    drawn = torch.stack([torch.randperm(count, generator=generator)[:num_draws] for _ in range(beyond.shape[1])])
    chosen = torch.stack([beyond[steps, i].sum(0) for i, steps in enumerate(drawn)])
    return SampleEstimates(
        vectors=tail + count / num_draws * chosen,
        squares=squared_deviations(first_and_half_order(gradients, first_order_steps)) + factor * spread,
        samples=list(range(beyond.shape[1])),
        draws=torch.arange(beyond.shape[1]),
        shared=max(factor * spread_of_means, 0.0),
    )


RESAMPLINGS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cosine:
    """Agreement in direction of two means over different samples.

    Attributes:
        value: in [-1, 1].
        low: lower end of the 95 % confidence interval.
        high: upper end of it.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (f"{round(number, 2) + 0.0:.2f}" for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"  # the sum turns -0 into 0


def gradient_norm(estimates: SampleEstimates) -> float:
    """Euclidean norm of the mean estimate."""
    return float(estimates.vectors.double().mean(0).norm())


def mean_square(estimates: SampleEstimates) -> float:
    """``|E g|^2`` without the noise: the mean product of independent estimates, below 0 at times where it is small."""
    return _mean_products(estimates.vectors, estimates.draws)[1]


def mean_product(estimates: SampleEstimates, reference: SampleEstimates) -> float:
    """``<E g, E r>`` without the noise: the mean product of the method on one sample and the reference on another."""
    own, other = estimates.vectors.double(), reference.vectors.double()
    place = {sample: i for i, sample in enumerate(reference.samples)}
    same = float((own * other[[place[sample] for sample in estimates.samples]]).sum())
    return (float(own.sum(0) @ other.sum(0)) - same) / (len(own) * (len(other) - 1))


def noise_scale(estimates: SampleEstimates) -> float:
    """tr(covariance) / ``|E g|^2`` of a single sample's estimate: a batch of this size is half noise.

    Infinite where the samples show no signal (McCandlish et al. 1812.06162).
    """
    signal = mean_square(estimates)
    return estimates.variance / signal if signal > 0 else math.inf


def paired_difference(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Mean of ``first - second`` over the same samples, (n,) each, and its standard error."""
    difference = first.double() - second.double()
    return float(difference.mean()), float(difference.std()) / len(difference) ** 0.5


def is_clearly_larger(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the mean of ``first`` (n,) is above that of ``second`` in a paired t-test at 95 %."""
    return direction(*paired_difference(first, second), len(first)) > 0


def first_half(num_samples: int, group_size: int) -> torch.Tensor:
    """Which samples belong to the first half, (N,), bool; groups stay whole where there are two or more.

    The samples of a group share a baseline, so halves that split one would not be independent.
    """
    groups = num_samples // group_size
    boundary = groups // 2 * group_size if groups > 1 else num_samples // 2
    return torch.arange(num_samples) < boundary


def cosine_to_reference(
    estimates: SampleEstimates, reference: SampleEstimates, is_first: torch.Tensor, seed: int = 0
) -> Cosine:
    """Cosine between a method's mean over one half of the samples and the reference's mean over the other half.

    Both ways are averaged, so no sample is compared with itself. Noise lowers it: even the reference itself stays
    below 1, and its own row shows how far one can get with so many samples.

    The interval is that of a bootstrap over samples within each half. Means of resampled samples are noisier, which
    lowers all cosines alike, so their distribution is moved back to the measured value.

    Args:
        estimates: of the method, of some of the samples.
        reference: of the reference, of all samples.
        is_first: which of all samples belong to the first half, (N,), bool.
    """
    generator = torch.Generator().manual_seed(seed)
    mine = [estimates.vectors[is_first[estimates.samples] == half].double() for half in (True, False)]
    theirs = [reference.vectors[is_first[reference.samples] == half].double() for half in (True, False)]
    evenly = [
        [torch.full((1, len(half)), 1 / len(half), dtype=torch.float64) for half in one] for one in (mine, theirs)
    ]
    value = float(_cosine_across(mine, evenly[0], theirs, evenly[1]))
    drawn = [_resampling(len(vectors), generator) for vectors in theirs]
    # The same draws for both where they have the same samples, because their errors are not independent.
    together = estimates.samples == reference.samples
    own = drawn if together else [_resampling(len(vectors), generator) for vectors in mine]
    spread = _cosine_across(mine, own, theirs, drawn)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(spread, torch.tensor([tail, 1 - tail], dtype=torch.float64)) - spread.mean()
    return Cosine(value, max(-1.0, value + float(low)), min(1.0, value + float(high)))


def _resampling(count: int, generator: torch.Generator) -> torch.Tensor:
    """Weights of ``count`` samples in bootstrap means, (RESAMPLINGS, count)."""
    drawn = torch.randint(count, (RESAMPLINGS, count), generator=generator)
    weights = torch.zeros(RESAMPLINGS, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.full_like(weights, 1 / count))


def _cosine_across(
    halves: list[torch.Tensor],
    weights: list[torch.Tensor],
    reference: list[torch.Tensor],
    reference_weights: list[torch.Tensor],
) -> torch.Tensor:
    """Cosines of weighted means, weights (R, n), of each half with the other half of the reference, averaged, (R,)."""
    pairs = [_cosine(halves[i], weights[i], reference[1 - i], reference_weights[1 - i]) for i in (0, 1)]
    return (pairs[0] + pairs[1]) / 2


def _cosine(
    first: torch.Tensor, first_weights: torch.Tensor, second: torch.Tensor, second_weights: torch.Tensor
) -> torch.Tensor:
    """From the inner products of the samples, which are fewer than their numbers; 0 where a mean is."""
    along = _products(first, first_weights, second, second_weights)
    squares = [_products(*one, *one).clamp(min=0) for one in ((first, first_weights), (second, second_weights))]
    norms = (squares[0] * squares[1]).sqrt()
    return along / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def _products(
    first: torch.Tensor, first_weights: torch.Tensor, second: torch.Tensor, second_weights: torch.Tensor
) -> torch.Tensor:
    """Inner products of weighted means of rows, (R,)."""
    return (first_weights @ (first @ second.T) * second_weights).sum(1)
