"""What to set, in plain sentences, and how sure that is.

The answer is the method that promises the most improvement per cost, a biased one only where that is clear.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlr_peft.config.estimator import ThreeOrdersArguments
from rlr_peft.diagnose.diagnosis import Diagnosis, MethodResult, bias_rank, squares_by_first_order_steps
from rlr_peft.diagnose.evidence import agreement, update_size
from rlr_peft.diagnose.methods import quoted
from rlr_peft.diagnose.single_samples import Cosine, is_clearly_larger, noise_scale, paired_difference
from rlr_peft.estimators.base import step_ranges
from rlr_peft.estimators.half_order import half_order_length_for_compute, half_order_length_for_memory
from rlr_peft.foreign_text import listed
from rlr_peft.reports import counted, short_number

BYTES_PER_GB = 1e9


@dataclass(frozen=True)
class Recommendation:
    """What follows from the measurements.

    Attributes:
        flags: what to set; empty where no estimator fits.
        answer: which method to take, why, and how sure and biased that is: three sentences at the most.
        advice: sentences by topic.
    """

    flags: str
    answer: list[str]
    advice: dict[str, str] = field(default_factory=dict)


def recommend(diagnosis: Diagnosis) -> Recommendation:
    """Every sentence follows from numbers of the diagnosis; where they do not decide, it says so."""
    advice: dict[str, str] = {}
    if diagnosis.evidence.differentiable:
        advice["First order"] = " ".join(_first_order(diagnosis))
    else:
        advice["Black-box tail"] = " ".join(_black_box(diagnosis))
    advice["Score terms"] = " ".join(_score_terms(diagnosis))
    if diagnosis.evidence.differentiable:
        advice["Mixed orders"] = " ".join(_mixed_orders(diagnosis))
    optional = {
        "One stage only": window_advice(diagnosis),
        "Budgets": budget_advice(diagnosis),
        "Hot steps": hot_step_advice(diagnosis),
        "Last step": last_step_advice(diagnosis),
        "Evidence": _evidence(diagnosis),
    }
    for topic, found in optional.items():
        text = " ".join(found)
        if text:
            advice[topic] = text
    return Recommendation(*answer_of(diagnosis), advice)


def _first_order(diagnosis: Diagnosis) -> Iterator[str]:
    best, num_steps = diagnosis.compared.first_order_steps, diagnosis.evidence.num_steps
    flags = f"`--estimator rlr --fo_steps {best}`"
    if best == num_steps:
        yield f"`rlr` takes the pathwise gradient through all {num_steps} steps, full backpropagation: {flags}."
    elif best == 0:
        yield f"`rlr` takes no pathwise gradient at all, but score terms everywhere: {flags}."
    else:
        yield f"`rlr` takes the pathwise gradient through the last {best} of {num_steps} steps: {flags}."
    yield "`--fo_steps auto`, its default, measures this again while training."
    chosen = _named(diagnosis, f"rlr, K = {best} (measured)")
    others = ("reinforce", "rlr, K = 1") if best == num_steps else ("full-bp", "reinforce")
    compared = [
        f"{short_number(result.estimates.variance)} for {quoted(result.method.name)}"
        for result in diagnosis.results
        if result.method.name in others
    ]
    against = f", against {listed(compared)}" if compared else ""
    yield f"A single sample's estimate then has variance {short_number(chosen.estimates.variance)}{against}."
    squares = squares_by_first_order_steps(diagnosis.evidence.gradients)
    tied = [k for k, other in squares.items() if k != best and not is_clearly_larger(other, squares[best])]
    if tied:
        yield (
            f"The evidence for this K is weak: with {diagnosis.evidence.num_samples} samples, K = "
            f"{step_ranges(tied)} may be as good."
        )
    else:
        yield f"Every other K is clearly noisier on these {diagnosis.evidence.num_samples} samples."


def _black_box(diagnosis: Diagnosis) -> Iterator[str]:
    steps = diagnosis.compared.black_box_steps
    yield "The reward has no gradient, so there is no pathwise term."
    if not diagnosis.evidence.noisy_steps:
        yield (
            "The chain has no noise either: raise `--eta` or `--num_inference_steps`, or nothing but the zeroth order "
            "is left."
        )
        return
    chosen, plain = _named(diagnosis, f"rlr, black-box tail of {steps} (measured)"), _named(diagnosis, "reinforce")
    if steps == 0:
        yield (
            "Antithetic samples cost more than they save here: `--black_box_steps 0`, plain score terms on all steps "
            "with noise."
        )
        return
    yield (
        f"Cover the last {steps} steps by the black-box tail, which compares every sample with its antithetic twin: "
        f"`--black_box_steps {steps}`. Variance times cost then is {short_number(chosen.variance_times_cost)}, against "
        f"{short_number(plain.variance_times_cost)} for plain score terms."
    )
    if not is_clearly_larger(plain.estimates.squares * plain.cost.work, chosen.estimates.squares * chosen.cost.work):
        yield "The evidence is weak: the difference is within its error."


def _score_terms(diagnosis: Diagnosis) -> Iterator[str]:
    evidence, tail = diagnosis.evidence, diagnosis.compared.covered_tail
    beyond = [t for t in range(tail + 1, evidence.num_steps + 1) if t in evidence.noisy_steps]
    if beyond:
        yield f"Its single-step score terms go on {steps_in_words(beyond)}, which is the default (`--ho_length 1`)."
    else:
        yield "No step needs a score term."
    if not evidence.differentiable:
        silent = [t for t in range(1, evidence.num_steps + 1) if t not in evidence.noisy_steps]
        if silent:
            yield f"Nothing can cover {steps_in_words(silent)}, where there is no noise: the gradient leaves that out."


def _mixed_orders(diagnosis: Diagnosis) -> Iterator[str]:
    crossing = _named(diagnosis, f"rlr, K = {diagnosis.compared.first_order_steps} (measured)")
    mixed = _named(diagnosis, "rlr, mixed orders")
    before, after = crossing.estimates.squares * crossing.cost.work, mixed.estimates.squares * mixed.cost.work
    gain, error = paired_difference(before, after)
    numbers = (
        f"variance times cost is {short_number(mixed.variance_times_cost)}, against "
        f"{short_number(crossing.variance_times_cost)} with one K"
    )
    if gain <= error:
        yield f"Mixing both orders of `rlr` at every step does not pay: {numbers}."
        return
    yield f"Mixing both orders of `rlr` at every step pays: {numbers}."
    yield "`--estimator rlr --step_choice inverse-variance` does it."
    if not is_clearly_larger(before, after):
        yield "The evidence is weak: the gain is little more than its error."


def _evidence(diagnosis: Diagnosis) -> Iterator[str]:
    count, reference = diagnosis.evidence.num_samples, diagnosis.reference
    name, scale = quoted(reference.method.name), noise_scale(reference.estimates)
    if math.isinf(scale):
        yield (
            f"{count} samples do not show a gradient above the noise, even with {name}: compare variances, not "
            "directions, or raise `--samples`."
        )
    else:
        yield (
            f"The reference is {name}. Its mean over about {max(1, round(scale)):,} samples has as much gradient as "
            f"noise; this measurement had {count}."
        )
    if reference.cosine.low <= 0:
        yield "Cosines say little here: even two halves of the reference's samples do not clearly agree."


def _named(diagnosis: Diagnosis, name: str) -> MethodResult:
    return next(result for result in diagnosis.results if result.method.name == name)


def budget_advice(diagnosis: Diagnosis) -> Iterator[str]:
    """Sentences on h; none where the config has no budget."""
    arguments = diagnosis.config.estimator
    if not isinstance(arguments, ThreeOrdersArguments):
        return
    if arguments.nfe_budget is None and arguments.memory_budget is None:
        return
    if arguments.nfe_budget is not None:
        yield _compute_advice(diagnosis, arguments, arguments.nfe_budget)
    if arguments.memory_budget is not None:
        yield _memory_advice(diagnosis, arguments.memory_budget)
    ratio = _variance_of_longer_blocks(diagnosis)
    if ratio is not None:
        yield (
            f"With blocks of h = 2 the whole estimate has {ratio:.1f} times the variance that it has with the single "
            "steps that they replace: a longer block pays only where it takes steps from the zeroth order."
        )


def _compute_advice(diagnosis: Diagnosis, arguments: ThreeOrdersArguments, budget: float) -> str:
    num_steps = diagnosis.evidence.num_steps
    tail = diagnosis.compared.first_order_steps
    if tail == num_steps:
        return f"nfe_budget {budget:g}: K = {tail} leaves no step for a block, so h does not matter."
    blocks = arguments.ho_blocks if isinstance(arguments.ho_blocks, int) else 1
    if blocks == 0:
        return f"nfe_budget {budget:g}: with ho_blocks 0 there is no block, so h does not matter."
    try:
        length = half_order_length_for_compute(budget, num_steps, tail, blocks, arguments.zo_chains * num_steps)
    except ValueError as error:
        return f"nfe_budget {budget:g} does not even allow h = 1. {error}"
    return (
        f"nfe_budget {budget:g} with K = {tail} and {counted(blocks, 'block')} allows `--ho_length {length}` "
        f"(`--fo_steps {tail} --ho_blocks {blocks}`)."
    )


def _memory_advice(diagnosis: Diagnosis, budget: float) -> str:
    half, zeroth = _step_memory(diagnosis, "reinforce"), _step_memory(diagnosis, "zeroth order on all steps")
    if half is None or zeroth is None or half <= zeroth:
        return f"memory_budget {budget:g} GB: the memory rule needs score terms that take more than the zeroth order."
    constants = f"`--ho_step_memory {half:.3g} --zo_step_memory {zeroth:.3g}`, as measured here for a micro-batch"
    try:
        length = half_order_length_for_memory(budget, half, zeroth, diagnosis.evidence.num_steps)
    except ValueError as error:
        return f"memory_budget {budget:g} GB does not even allow h = 1 with {constants}. {error}"
    return (
        f"memory_budget {budget:g} GB allows `--ho_length {length}` by the paper's rule with {constants}. That rule is "
        "about a tape of h steps; ours holds one step for every h."
    )


def _step_memory(diagnosis: Diagnosis, name: str) -> float | None:
    """GB that one step takes for a whole micro-batch of training."""
    result = _find(diagnosis, name)
    if result is None:
        return None
    scale = diagnosis.config.training.train_batch_size / diagnosis.cost_samples
    return result.cost.added_bytes * scale / BYTES_PER_GB


def _variance_of_longer_blocks(diagnosis: Diagnosis) -> float | None:
    pairs = (
        ("rlr, K = 1, blocks of h = 2", "rlr, K = 1"),
        ("rlr, no black-box tail, blocks of h = 2", "reinforce"),
    )
    for longer, single in pairs:
        first, second = _find(diagnosis, longer), _find(diagnosis, single)
        if first is not None and second is not None:
            return first.estimates.variance / second.estimates.variance
    return None


def _find(diagnosis: Diagnosis, name: str) -> MethodResult | None:
    return next((result for result in diagnosis.results if result.method.name == name), None)


def window_advice(diagnosis: Diagnosis) -> Iterator[str]:
    """The third of the chain where most of the gradient is, and how to train it alone."""
    evidence, tail = diagnosis.evidence, diagnosis.compared.first_order_steps
    stages = [stage for stage in diagnosis.profile.stages if stage.energy_share is not None]
    if not stages or not evidence.noisy_steps:
        return
    stage = max(stages, key=lambda stage: stage.energy_share or 0.0)
    yield (
        f"The {stage.name} stage ({steps_in_words(stage.steps)}) holds {stage.energy_share:.0%} of the gradient energy."
    )
    low = max(stage.first_step, tail + 1)
    if low > stage.last_step:
        yield f"The pathwise gradient covers all of it with K = {tail}, so a window for score terms gains nothing."
        return
    yield (
        f"To train this scale alone, draw score terms from it: `--estimator rlr --fo_steps {tail} --ho_blocks 1 "
        f"--ho_start window --ho_window {low} {stage.last_step}`. That is biased: steps outside the window "
        f"and beyond K = {tail} get nothing."
    )


def hot_step_advice(diagnosis: Diagnosis) -> Iterator[str]:
    """Steps where a score term is very noisy."""
    tail = "pathwise gradient" if diagnosis.evidence.differentiable else "black-box tail"
    for t, ratio in diagnosis.profile.hot_steps.items():
        is_covered = t <= diagnosis.compared.covered_tail
        covered = f"the {tail} covers it" if is_covered else "a score term there is very noisy"
        yield f"Step {t} is hot: its mean moves {ratio:.1f} times its noise per unit of denoiser output; {covered}."


def last_step_advice(diagnosis: Diagnosis) -> Iterator[str]:
    """What to do about a last step that hardly reacts to the denoiser."""
    profile = diagnosis.profile
    if profile.last_step_is_dead:
        yield (
            f"The last step is nearly dead: the image moves only {profile.last_step_sensitivity:.3f} per unit of "
            "denoiser output there, so truncated backpropagation with K = 1 hardly trains. Use a larger K, or another "
            "grid (`--timestep_spacing trailing`, unless this is one)."
        )


def steps_in_words(steps: Sequence[int]) -> str:
    """``step 2`` or ``steps 2-4, 7``."""
    return f"{'step' if len(steps) == 1 else 'steps'} {step_ranges(list(steps))}"


def answer_of(diagnosis: Diagnosis) -> tuple[str, list[str]]:
    """The flags of the method to take, and three sentences at the most: which and why, how biased, what batch.

    A biased method is taken where it promises more than the best unbiased one and the samples show beyond doubt that
    it points along the reference. Where no method is unbiased, the least biased ones count as such.
    """
    # What was measured on fewer samples, or cannot be chosen by flags, is no candidate.
    whole = diagnosis.evidence.num_samples
    candidates = [r for r in diagnosis.results if r.method.flags and len(r.estimates.samples) == whole]
    unbiased = [r for r in candidates if bias_rank(r.coverage) == bias_rank(diagnosis.reference.coverage)]
    if not unbiased:
        reason = "No method can train here: the reward has no gradient and the chain has no noise."
        return "", [f"{reason} Raise `--eta` or `--num_inference_steps`."]
    if math.isinf(noise_scale(diagnosis.reference.estimates)):
        flags = min(unbiased, key=lambda r: (r.variance_times_cost, not _is_rlr(r))).method.flags
        return flags, [
            f"Take `{flags}`: of the least biased methods it is the least noisy for its cost.",
            f"The {whole} samples show no gradient above the noise, so they cannot tell whether a biased method points "
            "the right way: raise `--samples`.",
        ]
    safe, best = _best(unbiased), _best(candidates)
    for rival in sorted(candidates, key=lambda r: -r.improvement):
        if rival.improvement <= safe.improvement:
            break
        cosine = _agreement(diagnosis, rival)
        if cosine is not None and cosine.low > 0:
            target = (
                "full gradient" if safe.coverage.unbiased else f"gradient of {quoted(diagnosis.reference.method.name)}"
            )
            # Those that promise more were passed over: the samples do not show where they point.
            behind = [r for r in candidates if r.improvement <= rival.improvement]
            it = "it" if rival is best else "of those that the samples show to point the right way it"
            return rival.method.flags, [
                _why(diagnosis, rival, behind, it),
                f"It is biased: its cosine with the {target} is {cosine}, noise taken out.",
                _batch(diagnosis, rival),
            ]
    least = "unbiased" if safe.coverage.unbiased else "least biased"
    return safe.method.flags, [
        _why(diagnosis, safe, unbiased, "it" if best is safe else f"of the {least} methods it"),
        _why_not(diagnosis, safe, best),
        _batch(diagnosis, safe),
    ]


def _best(results: Sequence[MethodResult]) -> MethodResult:
    """Of twins, such as full backpropagation and ``rlr`` with K = T, it is ``rlr``."""
    return max(results, key=lambda r: (r.improvement, _is_rlr(r)))


def _is_rlr(result: MethodResult) -> bool:
    return f"{result.method.flags} ".startswith("--estimator rlr ")


def _agreement(diagnosis: Diagnosis, result: MethodResult) -> Cosine | None:
    return agreement(result.estimates, diagnosis.reference.estimates, diagnosis.evidence.group_size)


def _why(diagnosis: Diagnosis, chosen: MethodResult, rivals: Sequence[MethodResult], it: str) -> str:
    others = [r for r in rivals if r.improvement > 0 and not math.isclose(r.improvement, chosen.improvement)]
    # `rlr` as it comes has a roulette where it has a choice of steps.
    plain = [r for r in others if r.method.name.endswith("roulette")]
    plain = plain or [r for r in others if r.method.name.endswith("(measured)")]
    compared = [*([_best(others)] if others else []), *plain]
    times = {r.method.name: short_number(chosen.improvement / r.improvement) for r in compared}
    against = [f"{factor} times that of {quoted(name)}" for name, factor in times.items()]
    return (
        f"Take `{chosen.method.flags}`: {it} promises the most improvement per cost for updates of "
        f"{update_size(diagnosis.config).samples} images{', ' + listed(against) if against else ''}."
    )


def _why_not(diagnosis: Diagnosis, safe: MethodResult, best: MethodResult) -> str:
    if best is safe:
        biased = "unbiased" if safe.coverage.unbiased else "as little biased as can be here"
        return f"It is {biased}, and no biased method promises more."
    cosine = _agreement(diagnosis, best)
    unsure = "shows no signal" if cosine is None else f"may point in another direction (cosine {cosine})"
    times = short_number(best.improvement / safe.improvement)
    return (
        f"{quoted(best.method.name)} promises {times} times as much, but it is biased, and its gradient {unsure}: "
        "measure again with more `--samples`."
    )


def _batch(diagnosis: Diagnosis, chosen: MethodResult) -> str:
    scale, own = noise_scale(chosen.estimates), update_size(diagnosis.config).samples
    if math.isinf(scale):
        return f"Its noise scale cannot be estimated from {diagnosis.evidence.num_samples} samples."
    rough = ""
    if diagnosis.reference.cosine.low <= 0:
        samples = diagnosis.evidence.num_samples
        rough = f" These numbers are rough: two halves of the {samples} samples do not clearly agree."
    size = max(1, round(scale))
    images = "1 image" if size == 1 else f"{size:,} images"
    return f"In an update of {images} gradient and noise would be equal; an update has {own} now.{rough}"
