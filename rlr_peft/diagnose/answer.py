"""Which method to take: the one that promises the most improvement per cost, a biased one only where that is clear."""

import math
from collections.abc import Sequence

from rlr_peft.diagnose.diagnosis import Diagnosis, MethodResult, bias_rank
from rlr_peft.diagnose.estimates import Cosine, noise_scale
from rlr_peft.diagnose.methods import quoted
from rlr_peft.diagnose.worth import agreement, update_size
from rlr_peft.estimators.auto import WORTH_A_BIAS
from rlr_peft.foreign_text import listed
from rlr_peft.intervals import short_number


def answer_of(diagnosis: Diagnosis) -> tuple[str, list[str]]:
    """The flags of the method to take, and three sentences at the most: which and why, how biased, what batch.

    A biased method is taken where it promises WORTH_A_BIAS times what the best unbiased one does and the samples show
    beyond doubt that it points along the reference. Where no method is unbiased, the least biased ones count as such.
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
            f"Take `{flags}`: of the methods that are not biased by choice it is the least noisy for its cost.",
            f"The {whole} samples show no gradient above the noise, so they cannot tell whether a biased method points "
            "the right way: raise `--samples`.",
        ]
    safe, best = _best(unbiased), _best(candidates)
    for rival in sorted(candidates, key=lambda r: -r.improvement):
        if rival.improvement < WORTH_A_BIAS * safe.improvement:
            break
        cosine = _agreement(diagnosis, rival)
        if cosine is not None and cosine.low > 0:
            target = (
                "full gradient" if safe.coverage.unbiased else f"gradient of {quoted(diagnosis.reference.method.name)}"
            )
            return rival.method.flags, [
                _why(diagnosis, rival, candidates, "it"),
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
    promised = f"{quoted(best.method.name)} promises {short_number(best.improvement / safe.improvement)} times as much"
    if best.improvement < WORTH_A_BIAS * safe.improvement:
        return f"{promised}, but is biased, which is worth it from {WORTH_A_BIAS:g} times on."
    cosine = _agreement(diagnosis, best)
    unsure = "shows no signal of its own" if cosine is None else f"may point elsewhere (cosine {cosine})"
    return f"{promised}, but is biased and {unsure}: raise `--samples`."


def _batch(diagnosis: Diagnosis, chosen: MethodResult) -> str:
    scale, own = noise_scale(chosen.estimates), update_size(diagnosis.config).samples
    if math.isinf(scale):
        return f"Its noise scale cannot be told from {diagnosis.evidence.num_samples} samples."
    rough = ""
    if diagnosis.reference.cosine.low <= 0:
        rough = (
            f"; all this is rough, as halves of the {diagnosis.evidence.num_samples} samples do not agree beyond doubt"
        )
    size = max(1, round(scale))
    images = "1 image" if size == 1 else f"{size:,} images"
    return f"A batch of {images} would be half noise (yours is {own}){rough}."
