"""What is measured on the same samples for every method: gradients by step and mirrored rewards, once; then its cost.

And what an update with a method's gradient is worth for that.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlr_peft.byte_counters import counted_tape
from rlr_peft.chain.steps import Chain
from rlr_peft.config import Config
from rlr_peft.diagnose.single_samples import Cosine, SampleEstimates, mean_product, mean_square, sample_estimates
from rlr_peft.errors import UserError
from rlr_peft.estimators.base import Coverage, Estimator, coverage_of
from rlr_peft.estimators.half_order import mirrored_advantages
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.estimators.step_gradients import GradientSketch, StepGradients, check_gradient, measure_step_gradients
from rlr_peft.estimators.variance import StepVariances, step_variances
from rlr_peft.reports import half_width


class DiagnosisError(UserError, ValueError):
    """The samples cannot tell anything about the estimators."""


# Halves of the samples are compared with each other, and each needs two for a spread.
MIN_SAMPLES = 4
# A mirrored step t costs t - 1 denoiser evaluations per sample, so a tail of n steps costs n (n - 1) / 2.
MAX_BLACK_BOX_STEPS = 6


@dataclass(frozen=True)
class Evidence:
    """What N samples showed.

    Attributes:
        gradients: sketches of every sample's gradients through every step.
        variances: of the pathwise and the score terms by step.
        mirrored: advantages of the black-box tail, ``mirrored[t - 1]`` for step t; (n, N) for a reward without
            gradient, with zeros at steps without noise, else (0, N).
        rewards: (N,) on the CPU.
        prompts: one per sample.
        group_size: samples per prompt, side by side.
        micro_batch_size: samples per trajectory.
    """

    gradients: StepGradients
    variances: StepVariances
    mirrored: torch.Tensor
    rewards: torch.Tensor
    prompts: list[str]
    group_size: int
    micro_batch_size: int

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.gradients.scores)

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.rewards)

    @property
    def differentiable(self) -> bool:
        """Whether the reward has a gradient."""
        return self.gradients.pathwise is not None

    @property
    def noisy_steps(self) -> list[int]:
        """The steps that have a score term."""
        return [t for t in range(1, self.num_steps + 1) if self.gradients.has_noise[t - 1]]


def gather_evidence(
    chain: Chain,
    objective: Objective,
    rollouts: Sequence[Rollout],
    advantages: torch.Tensor,
    sketch: GradientSketch,
    group_size: int,
) -> Evidence:
    """Replays every step of every sample once.

    Args:
        objective: asked for the rewards of mirrored samples where the reward has no gradient.
        rollouts: N samples in all.
        advantages: of the samples, leaving one out, (N,).
        group_size: samples per prompt.

    Raises:
        DiagnosisError: too few samples, or rewards that do not differ.
        CoverageError: the gradients are zero.
    """
    rewards = torch.cat([rollout.rewards for rollout in rollouts]).float().cpu()
    _check(rewards, group_size)
    is_differentiable = rollouts[0].reward_gradient is not None
    gradients = measure_step_gradients(
        chain, rollouts, advantages, sketch, with_held=is_differentiable, description="Gradients of single samples"
    )
    check_gradient(gradients, rollouts)
    return Evidence(
        gradients=gradients,
        variances=step_variances(gradients),
        mirrored=torch.cat([_mirrored(chain, objective, rollout) for rollout in rollouts], dim=1),
        rewards=rewards,
        prompts=[prompt.text for rollout in rollouts for prompt in rollout.trajectory.prompts],
        group_size=group_size,
        micro_batch_size=len(rollouts[0].rewards),
    )


def _check(rewards: torch.Tensor, group_size: int) -> None:
    if len(rewards) < MIN_SAMPLES:
        raise DiagnosisError(f"Expected {MIN_SAMPLES} samples or more, got {len(rewards)}; raise --samples.")
    groups = rewards.reshape(-1, group_size)
    if bool((groups == groups[:, :1]).all()):
        raise DiagnosisError(
            f"Expected rewards that differ between the images of a prompt, got the same for all {group_size} images of "
            f"every prompt ({len(groups)} prompts). Look at the images and the reward, or raise --samples."
        )


def _mirrored(chain: Chain, objective: Objective, rollout: Rollout) -> torch.Tensor:
    """(n, B)."""
    steps = 0 if rollout.reward_gradient is not None else min(MAX_BLACK_BOX_STEPS, chain.num_steps)
    advantages = torch.zeros(steps, len(rollout.rewards))
    for t in range(1, steps + 1):
        if chain.std(t) > 0:
            advantages[t - 1] = mirrored_advantages(chain, objective, rollout, t).float().cpu()
    return advantages


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
    advantages: torch.Tensor,
    generator: torch.Generator,
    sampling_seconds: float,
) -> tuple[Cost, Coverage]:
    """Estimates the gradient of one micro-batch once; the gradient is thrown away.

    Args:
        rollout: the micro-batch, B samples.
        advantages: of these, (B,).
        sampling_seconds: what sampling and scoring took, per sample.
    """
    clear_gradients(chain)
    evaluations, batch_size = chain.denoiser_evaluations, rollout.trajectory.batch_size
    with measured_memory(chain.parameters[0].device) as memory:
        started = time.perf_counter()
        book = estimator.accumulate(chain, objective, rollout, advantages, generator)
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
    advantages: torch.Tensor,
    sketch: GradientSketch,
    seed: int,
    max_samples: int | None = None,
    shares_draws: bool = True,
) -> SampleEstimates:
    """Estimates of a method that the sketches of single steps cannot tell, by running it on one sample at a time.

    Samples i and i + n / 2 get the same draw where a micro-batch has one draw for all: their likeness shows how much of
    the noise more samples would not average out.

    Args:
        advantages: of all samples, (N,).
        max_samples: take only so many of the samples, evenly spread; None takes all.
        shares_draws: whether the samples of a micro-batch share what the estimator draws.
    """
    samples = [rollout.select([i]) for rollout in rollouts for i in range(len(rollout.rewards))]
    chosen = evenly_spread(len(samples), len(samples) if max_samples is None else max_samples)
    draws = torch.arange(len(chosen)) % (math.ceil(len(chosen) / 2) if shares_draws else len(chosen))
    vectors = []
    for i, draw in zip(chosen, draws.tolist(), strict=True):
        clear_gradients(chain)
        generator = torch.Generator().manual_seed(seed + draw)
        estimator.accumulate(chain, objective, samples[i], advantages[i : i + 1], generator)
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
