"""Figures as files, and as drawings inside a page that take its colours, light or dark."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from rlr_peft.durable_files import replacing_file
from rlr_peft.evaluation.comparison.figures import ADAPTER_COLORS, BASE_COLOR
from rlr_peft.figures import GRID_LINE, INK, QUIET_INK
from rlr_peft.foreign_text import printable

# What a figure is drawn with, and the page's variable that stands for it.
VARIABLES = {
    INK: "--ink",
    QUIET_INK: "--quiet",
    GRID_LINE: "--line",
    BASE_COLOR: "--base",
    **{color: f"--adapter-{index}" for index, color in enumerate(ADAPTER_COLORS)},
}


def save_figure(path: Path, figure: Figure) -> Path:
    """Writes a PNG on white."""
    with replacing_file(path) as aside:
        figure.savefig(aside, facecolor="white", metadata={"Software": None})  # the version would change the bytes
    return path


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an `<svg>` element without background, with text as text and the page's variables as colours.

    Args:
        figure: what is drawn.
        name: different for every figure of a page: ids inside are made of it.
        label: what screen readers say.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:id|gid)="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|PolyCollection)[^"]*"', "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    opening = Markup('<svg role="img" aria-label="{}"').format(label)
    return opening + Markup(printable(svg.removeprefix("<svg")))
