"""What an update with a method's gradient is worth, and how far the method is from the reference, noise taken out."""

import math
from dataclasses import dataclass

import torch

from rlr_peft.config import Config
from rlr_peft.diagnose.estimates import Cosine, SampleEstimates, mean_product, mean_square
from rlr_peft.intervals import half_width


@dataclass(frozen=True)
class UpdateSize:
    """How an update is made: samples B in all, in M micro-batches, each with draws of its own."""

    samples: int
    micro_batches: int


def update_size(config: Config) -> UpdateSize:
    """Of one process, as a diagnosis is."""
    steps = config.training.gradient_accumulation_steps
    accumulated = steps if isinstance(steps, int) else 1
    return UpdateSize(config.training.train_batch_size * accumulated, accumulated)


def length_along(estimates: SampleEstimates, reference: SampleEstimates) -> float:
    """``<r, E g> / |r|^2`` with r the reference's expectation; not a number where the samples show no r."""
    square = mean_square(reference)
    return mean_product(estimates, reference) / square if square > 0 else math.nan


def improvement_per_cost(
    estimates: SampleEstimates, reference: SampleEstimates, work: float, update: UpdateSize
) -> float:
    """``<r, E g> / sqrt(E |mean of B g|^2) / cost``, see ``rlr_peft.estimators.auto``; up to a factor of all methods.

    Not a number where the samples show no r.

    Args:
        estimates: of the method.
        reference: whose expectation is r.
        work: cost of a sample.
        update: its size.
    """
    if mean_square(reference) <= 0:
        return math.nan
    along = max(mean_product(estimates, reference), 0.0)
    noise = max(estimates.variance - estimates.shared, 0.0) / update.samples + estimates.shared / update.micro_batches
    square = max(mean_square(estimates), 0.0) + noise
    return along / math.sqrt(square) / work if square > 0 else 0.0


def agreement(estimates: SampleEstimates, reference: SampleEstimates, group_size: int) -> Cosine | None:
    """Cosine of a method's expectation with the reference's, and its 95 % interval by a jackknife over prompts.

    Noise is taken out, so it is 1 for every unbiased method, but for the errors of few samples. None where either shows
    no signal.

    Args:
        estimates: of the method.
        reference: of the reference, of all samples.
        group_size: samples per prompt, side by side.
    """
    own, other = estimates.vectors.double(), reference.vectors.double()
    samples = torch.tensor(estimates.samples)
    products = own @ own.T, other @ other.T, own @ other.T
    independent = (
        estimates.draws[:, None] != estimates.draws,
        reference.draws[:, None] != reference.draws,
        samples[:, None] != torch.arange(len(other)),
    )

    def cosine(kept: torch.Tensor) -> float:
        mine = kept[samples]
        masks = (mine[:, None] & mine, kept[:, None] & kept, mine[:, None] & kept)
        mine_square, square, along = (
            float(product[apart & mask].mean())
            for product, apart, mask in zip(products, independent, masks, strict=True)
        )
        return along / math.sqrt(mine_square * square) if mine_square > 0 and square > 0 else math.nan

    value = cosine(torch.ones(len(other), dtype=torch.bool))
    if math.isnan(value):
        return None
    groups = torch.arange(len(other)) // (group_size if len(other) > group_size else 1)
    count = int(groups.max()) + 1
    left_out = torch.tensor([cosine(groups != group) for group in range(count)], dtype=torch.float64)
    # Without one prompt there may be no signal left: nothing is sure then.
    spread = left_out.var(correction=0).nan_to_num(nan=math.inf)
    error = half_width(float(((count - 1) * spread).sqrt()), count)
    limits = [min(max(limit, -1.0), 1.0) for limit in (value, value - error, value + error)]
    return Cosine(*limits)
