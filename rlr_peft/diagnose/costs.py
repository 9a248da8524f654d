"""What an estimator costs, by really running it on one micro-batch and measuring."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain.interface import Chain
from rlr_peft.diagnose.estimates import SampleEstimates, sample_estimates
from rlr_peft.estimators.base import Coverage, Estimator, Rollout, coverage_of
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.step_gradients import GradientSketch

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
