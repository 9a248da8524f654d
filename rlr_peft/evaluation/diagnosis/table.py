"""The methods as rows of texts, and these as a table for the console."""

import re
import textwrap
from collections.abc import Sequence

from rlr_peft.evaluation.diagnosis.diagnosis import Diagnosis, MethodResult
from rlr_peft.evaluation.diagnosis.recommendation import Recommendation
from rlr_peft.evaluation.diagnosis.statistics import gradient_norm, signal_to_noise
from rlr_peft.evaluation.diagnosis.wording import listed, quoted, short_number, with_error

OWN_UNITS = "*"
LINE_WIDTH = 118  # characters
# The table in two parts, because neither a terminal nor a page is as wide as all columns.
PARTS = {"What a sample costs": (0, 2, 3, 4, 5), "What its gradient is worth": (0, 1, 6, 7, 8, 9, 10)}


def column_titles(diagnosis: Diagnosis) -> list[str]:
    """Titles of the columns of ``row_of``."""
    samples = diagnosis.cost_samples
    return [
        "method",
        "unbiased",
        "NFE",
        "backwards",
        f"MB ({samples} samples)" if samples > 1 else "MB (1 sample)",
        "s/sample",
        "norm",
        "variance",
        "variance x cost",
        "signal/noise",
        "cosine [95 %]",
    ]


def row_of(result: MethodResult) -> list[str]:
    """One method in words and numbers, in the order of ``column_titles``."""
    cost, estimates, cosine = result.cost, result.estimates, result.cosine
    mark = OWN_UNITS if result.method.own_units else ""
    return [
        result.method.name,
        "yes" if result.coverage.unbiased else "no",
        f"{cost.denoiser_evaluations:g}",
        f"{cost.backward_passes:g}",
        f"{cost.peak_bytes / 2**20:,.1f}",
        short_number(cost.seconds),
        short_number(gradient_norm(estimates)) + mark,
        with_error(estimates.variance, estimates.variance_error) + mark,
        short_number(result.variance_times_cost) + mark,
        short_number(signal_to_noise(estimates)),
        f"{_cosine(cosine.value)} [{_cosine(cosine.low)}, {_cosine(cosine.high)}]",
    ]


def _cosine(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # the sum turns -0 into 0


def notes(diagnosis: Diagnosis) -> list[str]:
    """What the columns are, one sentence each."""
    evidence, reference = diagnosis.evidence, quoted(diagnosis.reference.method.name)
    few = sorted({len(r.estimates.samples) for r in diagnosis.results} - {evidence.num_samples})
    found = [
        "NFE are denoiser evaluations per sample, sampling included; a guided pair counts once. Backwards are backward "
        "passes through a denoiser step, per sample.",
        f"MB is the {diagnosis.memory}, for a micro-batch of {diagnosis.cost_samples}.",
        "Norm is that of the mean gradient. Variance is that of a single sample's estimate (trace of the covariance), "
        "with its standard error; divide it by the number of samples of an update. (Drawn steps and perturbations are "
        "drawn once for a micro-batch, so their noise averages out less.) Cost is NFE plus twice the backwards.",
        "Signal/noise is the squared norm of the expected gradient over the variance: its inverse is the number of "
        "samples whose mean has as much signal as noise. 0 means that no signal was found.",
        f"Cosine is that between the method's mean over one half of the {evidence.num_samples} samples and the mean of "
        f"{reference} over the other half, with a bootstrap interval. Noise lowers it: the row of {reference} shows "
        "what can be reached with so many samples.",
    ]
    if any(result.method.own_units for result in diagnosis.results):
        found.append(
            f"{OWN_UNITS} in units of its own, because rewards are normalised or only ordered: not comparable "
            "between methods."
        )
    if few:
        names = [quoted(r.method.name) for r in diagnosis.results if len(r.estimates.samples) in few]
        found.append(f"Measured on {few[0]} of the samples: {listed(names)}.")
    if not diagnosis.reference.coverage.unbiased:
        found.append(f"No method is unbiased here, so the reference is: {diagnosis.reference.coverage.describe()}")
    if evidence.differentiable:
        found.append(
            "K and the mixture were chosen on these very samples, which flatters their variance a little; training "
            "chooses on samples of its own."
        )
    return found


def console_text(diagnosis: Diagnosis, recommendation: Recommendation) -> str:
    """Facts, table, notes and recommendation, for a terminal."""
    lines = [f"{name}: {fact}" for name, fact in diagnosis.facts.items()]
    rows = [column_titles(diagnosis), *(row_of(result) for result in diagnosis.results)]
    for title, columns in PARTS.items():
        lines += ["", title, *_aligned([[row[column] for column in columns] for row in rows])]
    texts = [f"Left out: {quoted(name)}, because {reason}." for name, reason in diagnosis.comparison.left_out.items()]
    lines += ["", *_wrapped([*texts, *notes(diagnosis)]), "", "Recommendation"]
    if recommendation.flags:
        lines.append(f"  {recommendation.flags}")
    lines += _wrapped([f"{topic}: {text}" for topic, text in recommendation.advice.items()])
    return "\n".join(lines)


def _wrapped(texts: Sequence[str]) -> list[str]:
    """Lines of at most LINE_WIDTH characters; what stands between backticks stays on one line."""
    lines = []
    for text in texts:
        whole = re.sub(r"`[^`]*`", lambda match: match[0].replace(" ", "\0"), text)
        lines += textwrap.wrap(whole, LINE_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
