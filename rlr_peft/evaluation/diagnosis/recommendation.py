"""What to set, in plain sentences, and how sure that is."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from rlr_peft.estimators.base import step_ranges
from rlr_peft.evaluation.diagnosis.budgets import budget_advice
from rlr_peft.evaluation.diagnosis.diagnosis import Diagnosis, MethodResult
from rlr_peft.evaluation.diagnosis.profile import squares_by_first_order_steps
from rlr_peft.evaluation.diagnosis.statistics import (
    is_clearly_larger,
    paired_difference,
    signal_to_noise,
)
from rlr_peft.evaluation.diagnosis.step_advice import hot_step_advice, last_step_advice, window_advice
from rlr_peft.evaluation.diagnosis.wording import listed, quoted, short_number, steps_in_words


@dataclass(frozen=True)
class Recommendation:
    """What follows from the measurements.

    Attributes:
        flags: what to set; empty where no estimator fits.
        advice: sentences by topic.
    """

    flags: str
    advice: dict[str, str] = field(default_factory=dict)


def recommend(diagnosis: Diagnosis) -> Recommendation:
    """Every sentence follows from numbers of the diagnosis; where they do not decide, it says so."""
    advice: dict[str, str] = {}
    if diagnosis.evidence.differentiable:
        flags = f"--estimator rlr --fo_steps {diagnosis.comparison.first_order_steps}"
        advice["First order"] = " ".join(_first_order(diagnosis))
        sentences, pays = _mixed_orders(diagnosis)
        if pays:
            flags = "--estimator rlr --step_choice inverse-variance"
    else:
        flags = f"--estimator rlr --black_box_steps {diagnosis.comparison.black_box_steps}"
        advice["Black-box tail"] = " ".join(_black_box(diagnosis))
        sentences = []
        if not diagnosis.evidence.noisy_steps:
            flags = ""
    advice["Score terms"] = " ".join(_score_terms(diagnosis))
    if sentences:
        advice["Mixed orders"] = " ".join(sentences)
    advice["Price of precision"] = " ".join(_price(diagnosis))
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
    return Recommendation(flags, advice)


def _first_order(diagnosis: Diagnosis) -> Iterator[str]:
    best, num_steps = diagnosis.comparison.first_order_steps, diagnosis.evidence.num_steps
    if best == num_steps:
        yield f"Take the pathwise gradient through all {num_steps} steps: `--fo_steps {best}`, full backpropagation."
    elif best == 0:
        yield "Take no pathwise gradient at all: `--fo_steps 0`, score terms everywhere."
    else:
        yield f"Take the pathwise gradient through the last {best} of {num_steps} steps: `--fo_steps {best}`."
    yield "`--fo_steps auto`, the default, measures this again while training."
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
    mine = squares[best]
    assert mine is not None
    tied = [
        k for k, other in enumerate(squares) if other is not None and k != best and not is_clearly_larger(other, mine)
    ]
    if tied:
        yield (
            f"The evidence for this very K is weak: with {diagnosis.evidence.num_samples} samples, K = "
            f"{step_ranges(tied)} cannot be told from it."
        )
    else:
        yield f"Every other K is clearly noisier on these {diagnosis.evidence.num_samples} samples."


def _black_box(diagnosis: Diagnosis) -> Iterator[str]:
    steps = diagnosis.comparison.black_box_steps
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
            "Mirrored samples cost more than they save here: `--black_box_steps 0`, plain score terms on all steps "
            "with noise."
        )
        return
    yield (
        f"Cover the last {steps} steps by the black-box tail, which compares every sample with its mirror image: "
        f"`--black_box_steps {steps}`. Variance times cost then is {short_number(chosen.variance_times_cost)}, against "
        f"{short_number(plain.variance_times_cost)} for plain score terms."
    )
    if not is_clearly_larger(plain.estimates.squares * plain.cost.work, chosen.estimates.squares * chosen.cost.work):
        yield "The evidence is weak: the difference is within its error."


def _score_terms(diagnosis: Diagnosis) -> Iterator[str]:
    evidence, tail = diagnosis.evidence, diagnosis.comparison.covered_tail
    beyond = [t for t in range(tail + 1, evidence.num_steps + 1) if t in evidence.noisy_steps]
    if beyond:
        yield f"Single-step score terms go on {steps_in_words(beyond)}, which is the default (`--ho_length 1`)."
    else:
        yield "No step needs a score term."
    if not evidence.differentiable:
        silent = [t for t in range(1, evidence.num_steps + 1) if t not in evidence.noisy_steps]
        if silent:
            yield f"Nothing can cover {steps_in_words(silent)}, where there is no noise: the gradient leaves that out."


def _mixed_orders(diagnosis: Diagnosis) -> tuple[list[str], bool]:
    crossing = _named(diagnosis, f"rlr, K = {diagnosis.comparison.first_order_steps} (measured)")
    mixed = _named(diagnosis, "rlr, mixed orders")
    before, after = crossing.estimates.squares * crossing.cost.work, mixed.estimates.squares * mixed.cost.work
    gain, error = paired_difference(before, after)
    numbers = (
        f"variance times cost is {short_number(mixed.variance_times_cost)}, against "
        f"{short_number(crossing.variance_times_cost)} with one K"
    )
    if gain <= error:
        return [f"Mixing both orders at every step does not pay: {numbers}."], False
    sentence = f"Mixing both orders at every step pays: {numbers}. Set `--step_choice inverse-variance`."
    if is_clearly_larger(before, after):
        return [sentence], True
    return [sentence, "The evidence is weak: the gain is hardly more than its error."], True


def _price(diagnosis: Diagnosis) -> Iterator[str]:
    fair = [
        r
        for r in diagnosis.results
        if r.coverage.unbiased and len(r.estimates.samples) == diagnosis.evidence.num_samples
    ]
    if not fair:
        yield "No method is unbiased for this chain and reward."
        return
    ranked = sorted(fair, key=lambda result: result.variance_times_cost)
    best = ranked[0]
    yield (
        f"Of the unbiased methods, {quoted(best.method.name)} buys a given precision for the least compute: variance "
        f"times cost is {short_number(best.variance_times_cost)}."
    )
    work = best.estimates.squares * best.cost.work
    tied = [
        quoted(r.method.name)
        for r in ranked[1:]
        # The measured K may be T, or 0, which makes it another method's twin.
        if not torch.equal(r.estimates.vectors, best.estimates.vectors)
        and not is_clearly_larger(r.estimates.squares * r.cost.work, work)
    ]
    if tied:
        yield f"On these samples, {listed(tied)} cannot be told from it."


def _evidence(diagnosis: Diagnosis) -> Iterator[str]:
    count, reference = diagnosis.evidence.num_samples, diagnosis.reference
    name, ratio = quoted(reference.method.name), signal_to_noise(reference.estimates)
    if ratio == 0:
        yield (
            f"{count} samples do not show a gradient above the noise, even with {name}: compare variances, not "
            "directions, or raise `--samples`."
        )
    else:
        enough = max(1, round(1 / ratio))
        yield (
            f"With {name}, the reference, a mean over about {enough:,} samples holds as much gradient as noise; here "
            f"were {count}."
        )
    if reference.cosine.low <= 0:
        yield "Cosines say little here: even the reference's own halves do not agree beyond doubt."


def _named(diagnosis: Diagnosis, name: str) -> MethodResult:
    return next(result for result in diagnosis.results if result.method.name == name)
