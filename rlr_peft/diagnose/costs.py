"""What a method costs, measured on one micro-batch, and what an update with its gradient is worth for that."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain.interface import Chain
from rlr_peft.config import Config
from rlr_peft.diagnose.estimates import Cosine, SampleEstimates, mean_product, mean_square, sample_estimates
from rlr_peft.estimators.base import Coverage, Estimator, coverage_of
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.estimators.step_gradients import GradientSketch
from rlr_peft.reports import half_width

GPU_MEMORY = "peak of all memory allocated on the GPU while the gradient is estimated, model included"
TAPE_MEMORY = "peak of the bytes that autograd's tape holds while the gradient is estimated, weights not counted"


@dataclass(frozen=True)
class Cost:
    """What one sample costs.

    Attributes:
        denoiser_evaluations: those of sampling included; a guided pair counts once.
        backward_passes: through a denoiser step.
        seconds: sampling and scoring included.
        peak_bytes: of the whole micro-batch; ``memory_in_words`` says of what.
        added_bytes: the part of it that came with the estimate.
    """

    denoiser_evaluations: float
    backward_passes: float
    seconds: float
    peak_bytes: int
    added_bytes: int

    @property
    def work(self) -> float:
        """Forwards plus twice the backwards, which take about twice the time."""
        return self.denoiser_evaluations + 2 * self.backward_passes


@dataclass
class PeakMemory:
    """Bytes at the peak of a measurement, and what of them came on top of the start."""

    peak: int = 0
    added: int = 0


def memory_in_words(device: torch.device) -> str:
    """What the measured memory is."""
    return GPU_MEMORY if device.type == "cuda" else TAPE_MEMORY


@contextmanager
def measured_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Fills in what it yields when left: the allocator's peak on a GPU, the tape's elsewhere."""
    measured = PeakMemory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield measured
        torch.cuda.synchronize(device)
        measured.peak = torch.cuda.max_memory_allocated(device)
        measured.added = measured.peak - before
    else:
        with counted_tape() as tape:
            yield measured
        measured.peak = measured.added = tape.peak


def measure_cost(
    chain: Chain,
    objective: Objective,
    estimator: Estimator,
    rollout: Rollout,
    generator: torch.Generator,
    sampling_seconds: float,
) -> tuple[Cost, Coverage]:
    """Estimates the gradient of one micro-batch once; the gradient is thrown away.

    Args:
        chain: the chain.
        objective: scores.
        estimator: what to run.
        rollout: the micro-batch, B samples.
        generator: of the estimator's own draws.
        sampling_seconds: what sampling and scoring took, per sample.
    """
    clear_gradients(chain)
    evaluations, batch_size = chain.denoiser_evaluations, rollout.trajectory.batch_size
    with measured_memory(chain.parameters[0].device) as memory:
        started = time.perf_counter()
        book = estimator.accumulate(chain, objective, rollout, generator)
    # The GPU has been waited for by now.
    seconds = time.perf_counter() - started
    clear_gradients(chain)
    cost = Cost(
        denoiser_evaluations=chain.num_steps + (chain.denoiser_evaluations - evaluations) / batch_size,
        backward_passes=book.backward_passes,
        seconds=sampling_seconds + seconds / batch_size,
        peak_bytes=memory.peak,
        added_bytes=memory.added,
    )
    return cost, coverage_of(estimator, chain, rollout.reward_gradient is not None)


def run_on_single_samples(
    chain: Chain,
    objective: Objective,
    estimator: Estimator,
    rollouts: Sequence[Rollout],
    sketch: GradientSketch,
    seed: int,
    max_samples: int | None = None,
    shares_draws: bool = True,
) -> SampleEstimates:
    """Estimates of a method that the sketches of single steps cannot tell, by running it on one sample at a time.

    Samples i and i + n / 2 get the same draw where a micro-batch has one draw for all: their likeness shows how much of
    the noise more samples would not average out.

    Args:
        chain: the chain.
        objective: scores.
        estimator: what to run.
        rollouts: N samples in all.
        sketch: projects the gradients.
        seed: of the estimator's own draws.
        max_samples: take only so many of the samples, evenly spread; None takes all.
        shares_draws: whether the samples of a micro-batch share what the estimator draws.
    """
    samples = [rollout.select([i]) for rollout in rollouts for i in range(len(rollout.rewards))]
    chosen = evenly_spread(len(samples), len(samples) if max_samples is None else max_samples)
    draws = torch.arange(len(chosen)) % (math.ceil(len(chosen) / 2) if shares_draws else len(chosen))
    vectors = []
    for i, draw in zip(chosen, draws.tolist(), strict=True):
        clear_gradients(chain)
        estimator.accumulate(chain, objective, samples[i], torch.Generator().manual_seed(seed + draw))
        vectors.append(sketch([torch.zeros_like(p) if p.grad is None else p.grad for p in chain.parameters]).float())
    clear_gradients(chain)
    return sample_estimates(torch.stack(vectors), chosen, draws)


def evenly_spread(total: int, count: int) -> list[int]:
    """``count`` of 0..total - 1, or all of them, about equally many from both halves."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def clear_gradients(chain: Chain) -> None:
    """Drops the parameters' ``.grad``."""
    for parameter in chain.parameters:
        parameter.grad = None


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
