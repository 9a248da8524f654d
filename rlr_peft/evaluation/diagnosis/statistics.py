"""What estimates of single samples say of a method: its noise, its signal, its direction."""

from dataclasses import dataclass

import torch

from rlr_peft.evaluation.diagnosis.sample_estimates import SampleEstimates

RESAMPLINGS = 1000
CONFIDENCE = 0.95
# Of the normal distribution, two-sided at the confidence above.
NORMAL_QUANTILE = 1.96


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


def gradient_norm(estimates: SampleEstimates) -> float:
    """Euclidean norm of the mean estimate."""
    return float(estimates.vectors.double().mean(0).norm())


def signal_to_noise(estimates: SampleEstimates) -> float:
    """``|E g|^2 / variance`` of a single sample's estimate; its inverse is the number of samples for a ratio of 1.

    The squared norm of a mean over n samples holds variance / n of noise, which is taken off; at least 0.
    """
    variance = estimates.variance
    signal = gradient_norm(estimates) ** 2 - variance / len(estimates.vectors)
    return max(signal, 0.0) / variance if variance > 0 else 0.0


def paired_difference(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Mean of ``first - second`` over the same samples, (n,) each, and its standard error."""
    difference = first.double() - second.double()
    return float(difference.mean()), float(difference.std()) / len(difference) ** 0.5


def is_clearly_larger(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the mean of ``first`` (n,) is above that of ``second`` in a paired t-test at 95 %."""
    difference, error = paired_difference(first, second)
    # The first terms of the expansion of Student's quantile in the number of samples.
    quantile = NORMAL_QUANTILE + (NORMAL_QUANTILE**3 + NORMAL_QUANTILE) / (4 * (len(first) - 1))
    return difference > quantile * error


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
        seed: of the bootstrap.
    """
    generator = torch.Generator().manual_seed(seed)
    mine = [estimates.vectors[is_first[estimates.samples] == half].double() for half in (True, False)]
    theirs = [reference.vectors[is_first[reference.samples] == half].double() for half in (True, False)]
    value = float(_cosine_across(*_means(mine), *_means(theirs)))
    drawn = [_resampling(len(vectors), generator) for vectors in theirs]
    # The same draws for both where they have the same samples, because their errors are not independent.
    together = estimates.samples == reference.samples
    own = drawn if together else [_resampling(len(vectors), generator) for vectors in mine]
    spread = _cosine_across(*_means(mine, own), *_means(theirs, drawn))
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(spread, torch.tensor([tail, 1 - tail], dtype=torch.float64)) - spread.mean()
    return Cosine(value, max(-1.0, value + float(low)), min(1.0, value + float(high)))


def _resampling(count: int, generator: torch.Generator) -> torch.Tensor:
    """Weights of ``count`` samples in bootstrap means, (RESAMPLINGS, count)."""
    drawn = torch.randint(count, (RESAMPLINGS, count), generator=generator)
    weights = torch.zeros(RESAMPLINGS, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.full_like(weights, 1 / count))


def _means(halves: list[torch.Tensor], weights: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Mean, or weighted means, of the rows of every half, (..., d)."""
    if weights is None:
        return [half.mean(0) for half in halves]
    return [weight @ half for weight, half in zip(weights, halves, strict=True)]


def _cosine_across(
    first: torch.Tensor, second: torch.Tensor, reference_first: torch.Tensor, reference_second: torch.Tensor
) -> torch.Tensor:
    """Cosines of each half with the other half of the reference, averaged."""
    return (_cosine(first, reference_second) + _cosine(second, reference_first)) / 2


def _cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of the last dimension; 0 where a vector is."""
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    return (first * second).sum(-1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
