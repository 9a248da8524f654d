"""The diagnosis as a page that needs nothing but itself, as a figure, as JSON, and as text for the console."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlr_peft.config import config_to_dict
from rlr_peft.diagnose.diagnosis import Diagnosis, MethodResult, StepProfile
from rlr_peft.diagnose.evidence import update_size
from rlr_peft.diagnose.methods import Method, quoted
from rlr_peft.diagnose.recommendation import Recommendation
from rlr_peft.diagnose.single_samples import gradient_norm, noise_scale
from rlr_peft.figures import (
    ACCENT,
    INK,
    QUIET_INK,
    SECOND_ACCENT,
    SHADE,
    empty_figure,
    inline_svg,
    restrain,
    save_figure,
)
from rlr_peft.foreign_text import listed, page_environment, printable
from rlr_peft.reports import aligned, short_number, with_error, write_numbers, write_text

TEMPLATE = "report.html.j2"
OWN_UNITS = "*"
LINE_WIDTH = 118  # characters
# The table in two parts, because neither a terminal nor a page is as wide as all columns.
VALUE, COST = (0, 10, 1, 6, 7, 8, 9), (0, 2, 3, 4, 5)
PARTS = {"What its gradient is worth": VALUE, "What a sample costs": COST}
STAGE_SHADES = {"coarse": SHADE, "mid": "none", "fine": SHADE}
FIGURE = "Variances and gradient energy by step, and the variance of the whole estimate by K"


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
        "variance",
        "noise scale",
        "length",
        "cosine [95 %]",
        "gain/cost",
    ]


def row_of(result: MethodResult) -> list[str]:
    """One method in words and numbers, in the order of ``column_titles``."""
    cost, estimates = result.cost, result.estimates
    mark = OWN_UNITS if result.method.own_units else ""
    return [
        result.method.name,
        "yes" if result.coverage.unbiased else "no",
        f"{cost.denoiser_evaluations:g}",
        f"{cost.backward_passes:g}",
        f"{cost.peak_bytes / 2**20:,.1f}",
        short_number(cost.seconds),
        with_error(estimates.variance, estimates.variance_error) + mark,
        short_number(noise_scale(estimates)),
        short_number(result.length) + mark,
        str(result.cosine),
        short_number(result.improvement),
    ]


def notes(diagnosis: Diagnosis) -> list[str]:
    """What the columns are, one sentence each."""
    evidence, reference = diagnosis.evidence, quoted(diagnosis.reference.method.name)
    update = update_size(diagnosis.config)
    few = sorted({len(r.estimates.samples) for r in diagnosis.results} - {evidence.num_samples})
    found = [
        "NFE are denoiser evaluations per sample, sampling included; a guided pair counts once. Backwards are backward "
        "passes through a denoiser step, per sample.",
        f"MB is the {diagnosis.memory}, for a micro-batch of {diagnosis.cost_samples}.",
        "Variance is that of a single sample's estimate (trace of the covariance), with its standard error.",
        "Noise scale is the variance over the squared norm of the expected gradient, noise taken out: a batch of this "
        "size is half noise. Infinite means that no signal was found.",
        f"Length is that of the expected gradient along that of {reference}, which is 1; noise is taken out.",
        f"Cosine is that between the method's mean over one half of the {evidence.num_samples} samples and the mean of "
        f"{reference} over the other half, with a bootstrap interval. Noise lowers it: the row of {reference} shows "
        "what can be reached with so many samples. (The answer at the top has the noise taken out.)",
        f"Gain/cost is the improvement per cost: by what an update of {update.samples} samples is expected to raise "
        "the reward along that reference, for what it costs (NFE plus twice the backwards), relative to the best "
        "method; undefined without signal. What a micro-batch draws once for all its samples averages out less, and is "
        "counted so.",
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
            "K and the mixture were chosen on the same samples, so their variance looks a little too small here; "
            "training chooses on other samples."
        )
    return found


def console_text(diagnosis: Diagnosis, recommendation: Recommendation) -> str:
    """The answer first, then facts, tables, notes and details, for a terminal."""
    lines = ["Recommendation", *([f"  {recommendation.flags}"] if recommendation.flags else [])]
    lines += [*_wrapped(recommendation.answer), ""]
    lines += [f"{name}: {fact}" for name, fact in diagnosis.facts.items()]
    rows = [column_titles(diagnosis), *(row_of(result) for result in diagnosis.results)]
    for title, columns in PARTS.items():
        lines += ["", title, *aligned([[row[column] for column in columns] for row in rows])]
    texts = [f"Left out: {quoted(name)}, because {reason}." for name, reason in diagnosis.compared.left_out.items()]
    lines += ["", *_wrapped([*texts, *notes(diagnosis)]), "", "Details"]
    lines += _wrapped([f"{topic}: {text}" for topic, text in recommendation.advice.items()])
    return "\n".join(lines)


def _wrapped(texts: Sequence[str]) -> list[str]:
    """Lines of at most LINE_WIDTH characters; what stands between backticks stays on one line."""
    lines = []
    for text in texts:
        whole = re.sub(r"`[^`]*`", lambda match: match[0].replace(" ", "\0"), text)
        lines += textwrap.wrap(whole, LINE_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def write_report(path: Path, diagnosis: Diagnosis, recommendation: Recommendation) -> list[Path]:
    """Writes the page, and beside it the same name with .json and .png.

    Args:
        path: of the page, ending in ``.html``.

    Returns:
        The three paths.
    """
    figure = step_profile(diagnosis)
    return [
        write_text(path, page(diagnosis, recommendation, figure)),
        write_numbers(path.with_suffix(".json"), plain_numbers(diagnosis, recommendation)),
        save_figure(path.with_suffix(".png"), figure),
    ]


def page(diagnosis: Diagnosis, recommendation: Recommendation, figure: Figure) -> str:
    """The HTML, with the figure inside."""
    environment = page_environment(Path(__file__).parent)
    environment.filters["code"] = _with_code
    coverage: dict[str, list[Method]] = {}  # many methods cover the same
    for result in diagnosis.results:
        coverage.setdefault(result.coverage.describe(), []).append(result.method)
    return environment.get_template(TEMPLATE).render(
        facts=diagnosis.facts,
        answer=recommendation.answer,
        advice=recommendation.advice,
        value=VALUE,
        cost=COST,
        titles=column_titles(diagnosis),
        rows=[(row_of(result), result.improvement) for result in _best_first(diagnosis.results)],
        coverage=coverage,
        left_out=diagnosis.compared.left_out,
        notes=notes(diagnosis),
        stages=[stage for stage in diagnosis.profile.stages if stage.energy_share is not None],
        figure=inline_svg(figure, "steps", FIGURE),
    )


def _best_first(results: Sequence[MethodResult]) -> list[MethodResult]:
    """By improvement per cost; those of which it is not known come last."""
    return sorted(results, key=lambda result: -result.improvement if math.isfinite(result.improvement) else math.inf)


def _with_code(text: str) -> Markup:
    """Words between backticks as code, each flag by itself: lines break between flags; everything else is escaped."""
    parts = printable(text).split("`")
    return Markup("").join(
        Markup(" ").join(Markup("<code>{}</code>").format(flag) for flag in re.split(" (?=--)", part))
        if i % 2
        else escape(part)
        for i, part in enumerate(parts)
    )


def plain_numbers(diagnosis: Diagnosis, recommendation: Recommendation) -> dict[str, Any]:
    """All numbers in plain types; None where a number does not exist."""
    evidence, compared = diagnosis.evidence, diagnosis.compared
    return {
        "facts": dict(diagnosis.facts),
        "config": config_to_dict(diagnosis.config),
        "num_steps": evidence.num_steps,
        "num_samples": evidence.num_samples,
        "samples_per_prompt": evidence.group_size,
        "differentiable": evidence.differentiable,
        "rewards": _plain(evidence.rewards),
        "first_order_steps": compared.first_order_steps if evidence.differentiable else None,
        "black_box_steps": None if evidence.differentiable else compared.black_box_steps,
        "reference": diagnosis.reference.method.name,
        "memory": diagnosis.memory,
        "cost_samples": diagnosis.cost_samples,
        "methods": [_plain_method(result) for result in diagnosis.results],
        "left_out": dict(compared.left_out),
        "profile": _plain_profile(diagnosis.profile),
        "recommendation": {
            "flags": recommendation.flags,
            "answer": recommendation.answer,
            "advice": dict(recommendation.advice),
        },
    }


def _plain_method(result: MethodResult) -> dict[str, Any]:
    method, cost, estimates = result.method, result.cost, result.estimates
    return {
        "name": method.name,
        "flags": method.flags,
        "terms": method.estimator.describe(),
        "coverage": result.coverage.describe(),
        "coverage_weights": result.coverage.weights.tolist(),
        "unbiased": result.coverage.unbiased,
        "own_units": method.own_units,
        "samples": len(estimates.samples),
        "denoiser_evaluations": cost.denoiser_evaluations,
        "backward_passes": cost.backward_passes,
        "cost": cost.work,
        "seconds": cost.seconds,
        "peak_bytes": cost.peak_bytes,
        "added_bytes": cost.added_bytes,
        "gradient_norm": gradient_norm(estimates),
        "variance": estimates.variance,
        "variance_se": estimates.variance_error,
        "variance_times_cost": result.variance_times_cost,
        "variance_times_cost_se": estimates.variance_error * cost.work,
        "shared_variance": estimates.shared,
        "noise_scale": noise_scale(estimates),
        "length": result.length,
        "cosine": result.cosine.value,
        "cosine_low": result.cosine.low,
        "cosine_high": result.cosine.high,
        "improvement_per_cost": result.improvement,
    }


def _plain_profile(profile: StepProfile) -> dict[str, Any]:
    return {
        "steps": list(range(1, profile.num_steps + 1)),
        "energy": _plain(profile.energy),
        "signal": _plain(profile.signal),
        "first_order_variance": _plain(profile.first_order),
        "half_order_variance": _plain(profile.half_order),
        "black_box_variance": _plain(profile.black_box),
        "has_noise": profile.has_noise.tolist(),
        "variance_by_first_order_steps": _plain_choices(profile.by_first_order_steps),
        "hot_steps": {str(t): ratio for t, ratio in profile.hot_steps.items()},
        "last_step_sensitivity": profile.last_step_sensitivity,
        "last_step_is_dead": profile.last_step_is_dead,
        "stages": [vars(stage) for stage in profile.stages],
    }


def _plain_choices(by_first_order_steps: Mapping[int, tuple[float, float]] | None) -> Any:
    """Variance and standard error by K."""
    return None if by_first_order_steps is None else {str(k): list(row) for k, row in by_first_order_steps.items()}


def _plain(values: torch.Tensor | None) -> Any:
    """Nested lists; None stays."""
    return None if values is None else values.tolist()


def step_profile(diagnosis: Diagnosis) -> Figure:
    """Variances and gradient energy by step, and below the variance of the whole estimate by K; sampling runs right."""
    profile = diagnosis.profile
    heights = [3.4] if profile.by_first_order_steps is None else [3.4, 2.4]
    figure = empty_figure(1.2 + 1.2 * sum(heights), w_pad=0.15, h_pad=0.15)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_steps(axes[0], profile)
    if profile.by_first_order_steps is not None:
        _draw_choices(axes[1], profile.by_first_order_steps, profile.num_steps, diagnosis.compared.first_order_steps)
    return figure


def _draw_steps(axes: Axes, profile: StepProfile) -> None:
    steps = range(1, profile.num_steps + 1)
    _shade_stages(axes, profile)
    if profile.first_order is not None:
        _draw_curve(axes, steps, profile.first_order, ACCENT, "o", "pathwise gradient (first order)")
    noisy = [t for t in steps if profile.has_noise[t - 1]]
    if noisy:
        of_noisy = profile.half_order[:, profile.has_noise]
        _draw_curve(axes, noisy, of_noisy, SECOND_ACCENT, "s", "score term (half order)")
        hot = [t for t in noisy if t in profile.hot_steps]
        if hot:
            heights = [float(profile.half_order[0, t - 1]) for t in hot]
            axes.plot(hot, heights, "o", markersize=14, markerfacecolor="none", color=SECOND_ACCENT, label="hot step")
    if len(profile.black_box[0]):
        mirrored = [t for t in noisy if t <= len(profile.black_box[0])]
        of_mirrored = profile.black_box[:, [t - 1 for t in mirrored]]
        _draw_curve(axes, mirrored, of_mirrored, ACCENT, "o", "score term of the black-box tail (antithetic noise)")
    if profile.energy is not None:
        axes.plot(steps, profile.energy, color=INK, linewidth=0.8, linestyle=":", marker="x", label="gradient energy")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.18)  # room for the names of the stages
    axes.set_xlim(profile.num_steps + 0.5, 0.5)
    axes.set_xlabel("step t, from noise (left) to image (right) as in sampling", color=QUIET_INK)
    restrain(axes, "Variance of a single sample's gradient, step by step", "y", title_pad=34)  # the legend goes below
    axes.legend(
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        ncols=4,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        handlelength=1.6,
    )
    _mark_steps(axes, list(steps))


def _draw_choices(
    axes: Axes, by_first_order_steps: Mapping[int, tuple[float, float]], num_steps: int, chosen: int
) -> None:
    curve = torch.tensor(list(by_first_order_steps.values()), dtype=torch.float64).T
    _draw_curve(axes, list(by_first_order_steps), curve, ACCENT, "o", None)
    height, _ = by_first_order_steps[chosen]
    axes.plot([chosen], [height], "o", markersize=12, markerfacecolor="none", markeredgewidth=1.6, color=INK)
    axes.annotate(f"K = {chosen}", (chosen, height), (0, 14), textcoords="offset points", ha="center", color=INK)
    axes.set_yscale("log")
    axes.margins(y=0.25)
    axes.set_xlim(num_steps + 0.5, -0.5)
    axes.set_xlabel("K, steps next to the image with the pathwise gradient; score terms on the others", color=QUIET_INK)
    restrain(axes, "Variance of the whole estimate", "y")
    _mark_steps(axes, list(range(num_steps + 1)))


def _draw_curve(
    axes: Axes, steps: range | list[int], curve: torch.Tensor, color: str, marker: str, label: str | None
) -> None:
    """``curve`` is (2, number of steps): values and standard errors, the latter as a band."""
    values, errors = curve.tolist()
    # A band down to zero has no end on a logarithmic axis.
    lows = [max(value - error, value / 10) for value, error in zip(values, errors, strict=True)]
    highs = [value + error for value, error in zip(values, errors, strict=True)]
    axes.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=5, label=label)


def _shade_stages(axes: Axes, profile: StepProfile) -> None:
    for stage in profile.stages:
        axes.axvspan(stage.first_step - 0.5, stage.last_step + 0.5, color=STAGE_SHADES[stage.name], zorder=0)
        middle = (stage.first_step + stage.last_step) / 2
        share = "" if stage.energy_share is None else f"\n{stage.energy_share:.0%} of the energy"
        axes.text(
            middle,
            0.98,
            f"{stage.name}{share}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=10,
            color=QUIET_INK,
        )


def _mark_steps(axes: Axes, steps: list[int]) -> None:
    """About ten labels: round steps, the first and the last."""
    stride = max(1, round(len(steps) / 10))
    ends = (steps[0], steps[-1])
    between = [step for step in steps if step % stride == 0 and min(abs(step - end) for end in ends) > stride / 2]
    axes.set_xticks(sorted({*ends, *between}))
