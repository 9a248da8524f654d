"""The chain step by step as a figure, drawn with matplotlib's Agg canvas: no pyplot and hence no global state."""

from pathlib import Path

import torch
from matplotlib.axes import Axes

from rlr_peft.diagnose.diagnosis import Diagnosis, StepProfile
from rlr_peft.figures import (
    ACCENT,
    INK,
    QUIET_INK,
    SECOND_ACCENT,
    empty_figure,
    restrain,
    save_figure,
)

STAGE_SHADES = {"coarse": "#f1f1f1", "mid": "#ffffff", "fine": "#f1f1f1"}


def save_step_profile(path: Path, diagnosis: Diagnosis) -> Path:
    """Variances and gradient energy by step, and below the variance of the whole estimate by K; sampling runs right.

    Args:
        path: of the PNG.
        diagnosis: what to draw.

    Returns:
        `path`.
    """
    profile = diagnosis.profile
    heights = [3.4] if profile.by_first_order_steps is None else [3.4, 2.4]
    figure = empty_figure(1.2 + 1.2 * sum(heights), w_pad=0.15, h_pad=0.15)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_steps(axes[0], profile)
    if profile.by_first_order_steps is not None:
        _draw_choices(axes[1], profile.by_first_order_steps, diagnosis.compared.first_order_steps)
    return save_figure(path, figure)


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
        _draw_curve(axes, mirrored, of_mirrored, ACCENT, "o", "score term of the black-box tail (mirrored noise)")
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


def _draw_choices(axes: Axes, by_first_order_steps: torch.Tensor, chosen: int) -> None:
    values, errors = by_first_order_steps
    possible = [k for k in range(len(values)) if bool(values[k].isfinite())]
    _draw_curve(axes, possible, torch.stack([values[possible], errors[possible]]), ACCENT, "o", None)
    height = float(values[chosen])
    axes.plot([chosen], [height], "o", markersize=12, markerfacecolor="none", markeredgewidth=1.6, color=INK)
    axes.annotate(f"K = {chosen}", (chosen, height), (0, 14), textcoords="offset points", ha="center", color=INK)
    axes.set_yscale("log")
    axes.margins(y=0.25)
    axes.set_xlim(len(values) - 0.5, -0.5)
    axes.set_xlabel("K, steps next to the image with the pathwise gradient; score terms on the others", color=QUIET_INK)
    restrain(axes, "Variance of the whole estimate", "y")
    _mark_steps(axes, list(range(len(values))))


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
