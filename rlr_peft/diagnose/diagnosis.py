"""The diagnosis itself: what was measured of every method and of every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from rlr_peft.chain.steps import DEAD_STEP, Chain
from rlr_peft.config import Config
from rlr_peft.diagnose.evidence import (
    Cost,
    Evidence,
    gather_evidence,
    improvement_per_cost,
    length_along,
    measure_cost,
    memory_in_words,
    run_on_single_samples,
    update_size,
)
from rlr_peft.diagnose.methods import ComparedMethods, Method, methods_to_compare
from rlr_peft.diagnose.single_samples import (
    Cosine,
    SampleEstimates,
    cosine_to_reference,
    first_and_half_order,
    first_half,
    squared_deviations,
)
from rlr_peft.estimators.advantages import leave_one_out
from rlr_peft.estimators.base import Coverage, hot_steps
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.estimators.step_gradients import GradientSketch, StepGradients
from rlr_peft.estimators.variance import variance_and_error

# Without a GPU the cost of a method is measured on this many samples at the most: seconds per sample and bytes grow
# with the batch as they should, and time is short.
MAX_COST_SAMPLES_ON_CPU = 4


@dataclass(frozen=True)
class Stage:
    """A third of the chain.

    Attributes:
        name: "coarse" (next to the noise), "mid" or "fine" (next to the image).
        first_step: its step nearest to the image.
        last_step: its step nearest to the noise.
        energy_share: its share of the gradient energy, in [0, 1]; None for a reward without gradient.
    """

    name: str
    first_step: int
    last_step: int
    energy_share: float | None

    @property
    def steps(self) -> range:
        """Its steps t."""
        return range(self.first_step, self.last_step + 1)


@dataclass(frozen=True)
class StepProfile:
    """What every step looks like, at index t - 1; float64.

    Attributes:
        energy: E |G_t|^2, the mean squared norm of a sample's gradient through step t, (T,); None without gradient.
        signal: |E G_t|^2 with its noise bias taken off, at least 0, (T,); None without gradient.
        first_order: V_G(t) and its standard error, (2, T); None without gradient.
        half_order: V_H(t) and its standard error, (2, T); zeros where a step has no noise.
        black_box: the same of the black-box tail's terms, for the steps tried, (2, n); zeros where a step has no noise.
        has_noise: whether step t has a score term, (T,), bool.
        by_first_order_steps: variance of the whole estimate and its standard error, for every K in 0..T beyond which
            all steps have noise; None without gradient.
        hot_steps: ``|d mean / d output| / std`` of the steps whose mean reacts too strongly for a score term.
        last_step_sensitivity: ``|d x_0 / d output|`` of the last step.
        stages: coarse, mid and fine.
    """

    energy: torch.Tensor | None
    signal: torch.Tensor | None
    first_order: torch.Tensor | None
    half_order: torch.Tensor
    black_box: torch.Tensor
    has_noise: torch.Tensor
    by_first_order_steps: dict[int, tuple[float, float]] | None
    hot_steps: dict[int, float]
    last_step_sensitivity: float
    stages: list[Stage]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.has_noise)

    @property
    def last_step_is_dead(self) -> bool:
        """Whether the last step hardly reacts to the denoiser."""
        return self.last_step_sensitivity < DEAD_STEP


def profile_of(chain: Chain, evidence: Evidence) -> StepProfile:
    """Everything that is known by step."""
    gradients, num_steps = evidence.gradients, evidence.num_steps
    energy = signal = first_order = None
    if gradients.pathwise is not None:
        first_order = _variances(gradients.pathwise)
        energy = gradients.pathwise.double().square().sum(2).mean(1)
        mean_square = gradients.pathwise.double().mean(1).square().sum(1)
        signal = (mean_square - first_order[0] / evidence.num_samples).clamp(min=0)
    return StepProfile(
        energy=energy,
        signal=signal,
        first_order=first_order,
        half_order=_variances(gradients.half_order),
        black_box=_variances(evidence.mirrored[:, :, None] * gradients.scores[: len(evidence.mirrored)]),
        has_noise=gradients.has_noise,
        by_first_order_steps=None if gradients.pathwise is None else _by_first_order_steps(gradients),
        hot_steps=hot_steps(chain, evidence.noisy_steps),
        last_step_sensitivity=chain.output_sensitivity(1),
        stages=stages_of(num_steps, energy),
    )


def stages_of(num_steps: int, energy: torch.Tensor | None) -> list[Stage]:
    """The thirds of a chain of T steps, coarse first; a chain of fewer than three steps has fewer stages."""
    bounds = [round(num_steps * i / 3) for i in range(4)]
    stages = []
    for name, low, high in zip(("fine", "mid", "coarse"), bounds[:-1], bounds[1:], strict=True):
        if high > low:
            share = None if energy is None else float(energy[low:high].sum() / energy.sum())
            stages.append(Stage(name, low + 1, high, share))
    return stages[::-1]


def squares_by_first_order_steps(gradients: StepGradients) -> dict[int, torch.Tensor]:
    """Squared deviations (N,) of the whole estimate, for every K in 0..T beyond which all steps have noise."""
    return {
        k: squared_deviations(first_and_half_order(gradients, k))
        for k in range(len(gradients.scores) + 1)
        if bool(gradients.has_noise[k:].all())
    }


def _by_first_order_steps(gradients: StepGradients) -> dict[int, tuple[float, float]]:
    return {
        k: (float(squares.mean()), float(squares.std()) / len(squares) ** 0.5)
        for k, squares in squares_by_first_order_steps(gradients).items()
    }


def _variances(steps: torch.Tensor) -> torch.Tensor:
    """(T, N, d) to (2, T)."""
    pairs = [torch.stack(variance_and_error(step)) for step in steps]
    return torch.stack(pairs, dim=1) if pairs else torch.zeros(2, 0, dtype=torch.float64)


@dataclass(frozen=True)
class MethodResult:
    """What was measured of one method.

    Attributes:
        method: which.
        coverage: of the chain's steps.
        cost: of one sample.
        estimates: of single samples.
        cosine: to the reference.
        length: of its expectation along the reference's, relative to it; not a number where there is no signal.
        improvement: that an update promises per cost, relative to the best method; likewise.
    """

    method: Method
    coverage: Coverage
    cost: Cost
    estimates: SampleEstimates
    cosine: Cosine
    length: float
    improvement: float

    @property
    def variance_times_cost(self) -> float:
        """Variance of a single sample's estimate times its work: what a given precision costs."""
        return self.estimates.variance * self.cost.work


@dataclass(frozen=True)
class Diagnosis:
    """All that is reported.

    Attributes:
        facts: what was diagnosed, in words, by name.
        config: the run's.
        evidence: what N samples showed.
        compared: the methods, and those left out.
        results: one per method.
        profile: the chain step by step.
        reference: name of the method whose mean is the reference gradient.
        cost_samples: size of the micro-batch on which costs were measured.
        memory: what the measured memory is, in words.
    """

    facts: Mapping[str, str]
    config: Config
    evidence: Evidence
    compared: ComparedMethods
    results: list[MethodResult]
    profile: StepProfile
    reference: MethodResult
    cost_samples: int
    memory: str


def diagnose(
    chain: Chain,
    objective: Objective,
    rollouts: Sequence[Rollout],
    config: Config,
    *,
    group_size: int,
    sampling_seconds: float,
    facts: Mapping[str, str],
) -> Diagnosis:
    """Measures every method on the given samples; the weights stay as they are.

    Args:
        chain: the chain that is to be trained.
        rollouts: N samples in all.
        group_size: samples per prompt, side by side.
        sampling_seconds: what sampling and scoring took, per sample.
        facts: what is diagnosed, in words, by name.

    Raises:
        DiagnosisError: too few samples, rewards that do not differ, or gradients that are zero.
    """
    seed = config.training.seed
    sketch = GradientSketch(chain.parameters)
    advantages = leave_one_out(torch.cat([rollout.rewards for rollout in rollouts]), group_size)
    evidence = gather_evidence(chain, objective, rollouts, advantages, sketch, group_size)
    compared = methods_to_compare(chain, evidence, config)
    batch = cost_batch(rollouts)
    of_batch = advantages[: batch.trajectory.batch_size]
    generator = torch.Generator().manual_seed(seed)
    # The first run with a new size of batch is slower than all others.
    measure_cost(chain, objective, compared.methods[0].estimator, batch, of_batch, generator, sampling_seconds)
    measured: list[tuple[Method, Cost, Coverage, SampleEstimates]] = []
    with tqdm(compared.methods, desc="Methods", unit="method") as bar:
        for method in bar:
            estimator, estimates = method.estimator, method.estimates
            cost, coverage = measure_cost(chain, objective, estimator, batch, of_batch, generator, sampling_seconds)
            if estimates is None:
                estimates = run_on_single_samples(
                    chain,
                    objective,
                    estimator,
                    rollouts,
                    advantages,
                    sketch,
                    seed,
                    method.max_samples,
                    method.shares_draws,
                )
            measured.append((method, cost, coverage, estimates))
    reference = min(measured, key=lambda row: _rank_as_reference(row[2], row[3], evidence))[3]
    is_first = first_half(evidence.num_samples, group_size)
    update = update_size(config)
    promised = [improvement_per_cost(estimates, reference, cost.work, update) for _, cost, _, estimates in measured]
    best = max(promised)
    results = [
        MethodResult(
            method,
            coverage,
            cost,
            estimates,
            cosine_to_reference(estimates, reference, is_first, seed),
            length_along(estimates, reference),
            improvement / best,
        )
        for (method, cost, coverage, estimates), improvement in zip(measured, promised, strict=True)
    ]
    return Diagnosis(
        facts=facts,
        config=config,
        evidence=evidence,
        compared=compared,
        results=results,
        profile=profile_of(chain, evidence),
        reference=next(result for result in results if result.estimates is reference),
        cost_samples=batch.trajectory.batch_size,
        memory=memory_in_words(chain.parameters[0].device),
    )


def cost_batch(rollouts: Sequence[Rollout]) -> Rollout:
    """The micro-batch on which costs are measured: training's own on a GPU, a part of it elsewhere; whole pairs."""
    size = rollouts[0].trajectory.batch_size
    if rollouts[0].trajectory.latents.device.type != "cuda":
        size = min(size, MAX_COST_SAMPLES_ON_CPU)
    return rollouts[0].select(list(range(size - size % 2 if size > 1 else size)))


def bias_rank(coverage: Coverage) -> tuple[int, int]:
    """Smaller is less biased: bent in the fewest ways, then the fewest steps left out.

    A reward without gradient on a chain whose last step has no noise has no unbiased method: the least biased one then
    leaves out nothing else.
    """
    bends = len(coverage.departures) + (coverage.smoothing is not None)
    return bends, int((coverage.weights < 1 - 1e-9).sum())


def _rank_as_reference(coverage: Coverage, estimates: SampleEstimates, evidence: Evidence) -> tuple[int, int, float]:
    """Smaller is better: measured on all samples and least bent, then nothing left out, then least noise."""
    bends, uncovered = bias_rank(coverage)
    is_partial = len(estimates.samples) < evidence.num_samples
    return bends + is_partial, uncovered, estimates.variance
