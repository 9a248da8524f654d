"""The diagnosis itself: what was measured of every method, and what follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from rlr_peft.chain.interface import Chain
from rlr_peft.config import Config
from rlr_peft.estimators.base import Coverage, Rollout
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.variance import GradientSketch
from rlr_peft.evaluation.diagnosis.costs import Cost, measure_cost, memory_in_words, run_on_single_samples
from rlr_peft.evaluation.diagnosis.evidence import Evidence, gather_evidence
from rlr_peft.evaluation.diagnosis.methods import Comparison, Method, methods_to_compare
from rlr_peft.evaluation.diagnosis.profile import StepProfile, profile_of
from rlr_peft.evaluation.diagnosis.sample_estimates import SampleEstimates
from rlr_peft.evaluation.diagnosis.statistics import Cosine, cosine_to_reference, first_half

# Without a GPU the cost of a method is measured on this many samples at the most: seconds per sample and bytes grow
# with the batch as they should, and time is short.
MAX_COST_SAMPLES_ON_CPU = 4


@dataclass(frozen=True)
class MethodResult:
    """What was measured of one method.

    Attributes:
        method: which.
        coverage: of the chain's steps.
        cost: of one sample.
        estimates: of single samples.
        cosine: to the reference.
    """

    method: Method
    coverage: Coverage
    cost: Cost
    estimates: SampleEstimates
    cosine: Cosine

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
        comparison: the methods, and those left out.
        results: one per method.
        profile: the chain step by step.
        reference: name of the method whose mean is the reference gradient.
        cost_samples: size of the micro-batch on which costs were measured.
        memory: what the measured memory is, in words.
    """

    facts: Mapping[str, str]
    config: Config
    evidence: Evidence
    comparison: Comparison
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
    show_progress: bool = True,
) -> Diagnosis:
    """Measures every method on the given samples; the weights stay as they are.

    Args:
        chain: the chain that is to be trained.
        objective: scores.
        rollouts: N samples in all, with leave-one-out advantages.
        config: of the run.
        group_size: samples per prompt, side by side.
        sampling_seconds: what sampling and scoring took, per sample.
        facts: what is diagnosed, in words, by name.
        show_progress: False hides the bars.

    Raises:
        DiagnosisError: too few samples, rewards that do not differ, or gradients that are zero.
    """
    seed = config.training.seed
    sketch = GradientSketch(chain.parameters)
    evidence = gather_evidence(chain, objective, rollouts, sketch, group_size, show_progress)
    comparison = methods_to_compare(evidence, config.estimator, seed)
    batch = cost_batch(rollouts)
    generator = torch.Generator().manual_seed(seed)
    # The first run with a new size of batch is slower than all others.
    measure_cost(chain, objective, comparison.methods[0].estimator, batch, generator, sampling_seconds)
    measured: list[tuple[Method, Cost, Coverage, SampleEstimates]] = []
    with tqdm(comparison.methods, desc="Methods", unit="method", disable=not show_progress) as bar:
        for method in bar:
            estimator, estimates = method.estimator, method.estimates
            cost, coverage = measure_cost(chain, objective, estimator, batch, generator, sampling_seconds)
            if estimates is None:
                estimates = run_on_single_samples(
                    chain, objective, estimator, rollouts, sketch, generator, method.max_samples
                )
            measured.append((method, cost, coverage, estimates))
    reference = min(measured, key=lambda row: _rank_as_reference(row[2], row[3], evidence))[3]
    is_first = first_half(evidence.num_samples, group_size)
    results = [
        MethodResult(method, coverage, cost, estimates, cosine_to_reference(estimates, reference, is_first, seed))
        for method, cost, coverage, estimates in measured
    ]
    return Diagnosis(
        facts=facts,
        config=config,
        evidence=evidence,
        comparison=comparison,
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


def _rank_as_reference(coverage: Coverage, estimates: SampleEstimates, evidence: Evidence) -> tuple[bool, int, float]:
    """Smaller is better: measured on all samples, then nothing left out or bent, then the least noise.

    A reward without gradient on a chain whose last step has no noise has no unbiased method; the reference then is one
    that leaves out nothing else.
    """
    is_bent = bool(coverage.departures) or coverage.smoothing is not None
    uncovered = int((coverage.weights < 1 - 1e-9).sum())
    is_partial = len(estimates.samples) < evidence.num_samples
    return is_partial or is_bent, uncovered, estimates.variance
