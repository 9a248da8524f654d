"""All that a comparison leaves: the page, tables for the console and as Markdown, figures, and one row per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
from matplotlib.figure import Figure
from pyarrow.csv import write_csv
from pyarrow.parquet import write_table
from torch import Tensor

from rlr_peft.compare.comparison import Comparison, draw_figures, notes
from rlr_peft.compare.distances import Estimate
from rlr_peft.compare.evaluation import SMALL_SIDE, make_pictures
from rlr_peft.figures import inline_svg, save_figure
from rlr_peft.files import replacing_file
from rlr_peft.foreign_text import in_text, inside_script, listed, page_environment
from rlr_peft.prompt import ConditionImage, as_prompt
from rlr_peft.reports import aligned, decimals_of_scores, gain_with_error, with_error, write_numbers, write_text
from rlr_peft.rewards.preprocessing import condition_pixels

PAGE, NUMBERS, MARKDOWN = "compare.html", "compare.json", "compare.md"
FIGURES, SCORES = "figures", "scores"
TEMPLATE = "page.html.j2"
MOST_PAIRS = 96
CAPTIONS = {
    "rewards": (
        "Distribution of the rewards",
        "Left the scores of all images, right the paired differences; triangles mark the means.",
    ),
    "reward_kl": (
        "Reward against KL",
        "What a gain cost in divergence from the base; the dashed line is the base. Bars are one standard error.",
    ),
    "attributes": (
        "Paired differences by attribute",
        "What the reward tells beside its score, adapter minus base; whiskers are one standard error.",
    ),
}
UNKNOWN = "-"


def score_columns(comparison: Comparison) -> dict[str, list[Any]]:
    """One row per model and image: model, prompt, seed, the rewards' scores and info by name, and the image's file."""
    columns: dict[str, list[Any]] = {"model": [], "prompt": [], "seed": []}
    names = {reward.key: reward.name for reward in comparison.rewards}
    info = [
        name
        for key, found in comparison.attributes.items()
        for name in found
        if f"{names[key]}/{name.removeprefix(f'{key}/')}" not in names.values()  # measured as a reward of its own
    ]
    for model in comparison.models:
        evaluation = model.evaluation
        columns["model"] += [model.label] * len(evaluation.prompts)
        columns["prompt"] += [str(prompt) for prompt in evaluation.prompts]
        columns["seed"] += evaluation.seeds
        for key, name in names.items():
            columns.setdefault(name, []).extend(evaluation.scores[key].tolist())
        for name in info:
            key, _, rest = name.partition("/")
            columns.setdefault(f"{names[key]}/{rest}", []).extend(evaluation.info[name].tolist())
        if all(other.image_files for other in comparison.models):
            columns.setdefault("image", []).extend(model.image_files)
    return columns


def write_scores(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes `scores.parquet` and `scores.csv`; returns their paths."""
    rows = pyarrow.table(score_columns(comparison))
    parquet, csv = folder / f"{SCORES}.parquet", folder / f"{SCORES}.csv"
    with replacing_file(parquet) as aside:
        write_table(rows, aside)
    with replacing_file(csv) as aside:
        write_csv(rows, aside)
    return [parquet, csv]


def plain_numbers(comparison: Comparison) -> dict[str, Any]:
    """All summaries in plain types."""
    names = {reward.key: reward.name for reward in comparison.rewards}
    varieties = comparison.varieties
    adapters = []
    for index, (adapter, gains) in enumerate(zip(comparison.adapters, comparison.gains, strict=True)):
        divergence = comparison.divergences[index]
        adapters.append(
            {
                "label": adapter.label,
                "rewards": {names[key]: gains[key] for key in names},
                "attributes": {
                    names[key]: {name.removeprefix(f"{key}/"): gains[name] for name in found}
                    for key, found in comparison.attributes.items()
                },
                "variety": None if varieties is None else asdict(varieties[index + 1]),
                "kl": None if divergence is None else asdict(divergence),
                "kl_samples": 0 if adapter.divergence is None else len(adapter.divergence),
            }
        )
    return {
        "facts": dict(comparison.facts),
        "heldout": [reward.name for reward in comparison.rewards if reward.heldout],
        "images": len(comparison.base.evaluation.prompts),
        "features": comparison.features,
        "base": {
            "label": comparison.base.label,
            "variety": None if varieties is None else asdict(varieties[0]),
        },
        "adapters": adapters,
        "notes": notes(comparison),
    }


def write_report(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes `compare.html`, `compare.json`, `compare.md`, `scores.parquet`, `scores.csv` and `figures/*.png`.

    Returns:
        Their paths, the page first.
    """
    drawn = draw_figures(comparison)
    saved = [save_figure(folder / FIGURES / f"{name}.png", figure) for name, figure in drawn.items()]
    return [
        write_text(folder / PAGE, page(comparison, drawn)),
        write_numbers(folder / NUMBERS, plain_numbers(comparison)),
        write_text(folder / MARKDOWN, markdown(comparison)),
        *write_scores(folder, comparison),
        *saved,
    ]


def write_page_and_scores(folder: Path, comparison: Comparison) -> list[Path]:
    """Writes only `compare.html`, `scores.parquet` and `scores.csv`, for a folder that holds much else; their paths."""
    return [write_text(folder / PAGE, page(comparison, draw_figures(comparison))), *write_scores(folder, comparison)]


@dataclass(frozen=True)
class _Card:
    """One pair on the page; `base`, `adapters` and `condition`, the picture that both were drawn from if there is one,
    are data URIs, `place` is that among the pairs as they were drawn."""

    place: int
    prompt: str
    seed: int
    base: str
    adapters: list[str]
    width: int
    height: int
    small: bool
    condition: str | None


def page(comparison: Comparison, drawn: dict[str, Figure]) -> str:
    """The HTML."""
    environment = page_environment(Path(__file__).parent)
    chosen = chosen_pairs(comparison)
    labels = [adapter.label for adapter in comparison.adapters]
    total = len(comparison.base.evaluation.prompts)
    return environment.get_template(TEMPLATE).render(
        title=_title(comparison, labels),
        subtitle=f"{total} images each, drawn from the same prompts and seeds.",
        base_label=comparison.base.label,
        adapters=labels,
        rewards=[f"{reward.name} (held out)" if reward.heldout else reward.name for reward in comparison.rewards],
        notes=notes(comparison),
        tables=tables(comparison),
        is_video=comparison.base.evaluation.pictures[0].num_frames > 1,
        shown=_shown(comparison, chosen),
        cards=[_card(comparison, index, place) for place, index in _worst_first(comparison, chosen)],
        figures=[
            {
                "title": CAPTIONS[name][0],
                "caption": CAPTIONS[name][1],
                "svg": inline_svg(figure, name, CAPTIONS[name][0]),
            }
            for name, figure in drawn.items()
        ],
        facts=comparison.facts,
        data=inside_script(_data(comparison, chosen)),
    )


def chosen_pairs(comparison: Comparison, most: int = MOST_PAIRS) -> list[int]:
    """Which images the page shows, in the order in which they were drawn.

    All if they are few. Else, taking turns between the adapters: two of those that lost most of the first reward for
    one that gained most and one from the front.
    """
    total = len(comparison.base.evaluation.prompts)
    if total <= most:
        return list(range(total))
    queues = []
    for number in range(len(comparison.adapters)):
        worst = _first_gains(comparison, number).argsort(stable=True).tolist()
        queues += [iter(worst), iter(worst[::-1]), iter(worst), iter(range(total))]
    found: dict[int, None] = {}
    while len(found) < most:
        for queue in queues:
            fresh = next((index for index in queue if index not in found), None)
            if fresh is not None and len(found) < most:
                found[fresh] = None
    return sorted(found)


def _first_gains(comparison: Comparison, number: int) -> Tensor:
    """What an adapter gained of the first reward, image by image, (n,) float64."""
    key, adapter = comparison.rewards[0].key, comparison.adapters[number]
    return adapter.evaluation.scores[key].double() - comparison.base.evaluation.scores[key].double()


def _title(comparison: Comparison, labels: Sequence[str]) -> str:
    name = comparison.facts.get("base")
    return f"{listed(labels)} against the base" + ("" if name is None else f" {name}")


def _shown(comparison: Comparison, chosen: Sequence[int]) -> str:
    total = len(comparison.base.evaluation.prompts)
    if len(chosen) == total:
        return f"All {total}, the largest losses first."
    where = " All of them are in the folder images." if comparison.base.image_files else ""
    return f"{len(chosen)} of {total}: those that lost most, those that gained most and the first ones.{where}"


def _worst_first(comparison: Comparison, chosen: Sequence[int]) -> list[tuple[int, int]]:
    """Place and index, by the gain of the first adapter in the first reward: as the page's script sorts at first."""
    gains = _first_gains(comparison, 0)
    return sorted(enumerate(chosen), key=lambda pair: (float(gains[pair[1]]), pair[0]))


def _card(comparison: Comparison, index: int, place: int) -> _Card:
    base = comparison.base.evaluation
    picture = base.pictures[index]
    return _Card(
        place=place,
        prompt=str(base.prompts[index]),
        seed=base.seeds[index],
        base=picture.data_uri,
        adapters=[adapter.evaluation.pictures[index].data_uri for adapter in comparison.adapters],
        width=picture.width,
        height=picture.height,
        small=max(picture.width // picture.num_frames, picture.height) <= SMALL_SIDE,
        condition=_condition(as_prompt(base.prompts[index]).image, picture.width // picture.num_frames, picture.height),
    )


def _condition(image: ConditionImage | None, width: int, height: int) -> str | None:
    if image is None:
        return None
    return make_pictures(condition_pixels(image, width, height)[None])[0].data_uri


def _data(comparison: Comparison, chosen: Sequence[int]) -> dict[str, Any]:
    keys = [reward.key for reward in comparison.rewards]
    base = comparison.base.evaluation

    def scores(model: Any, index: int) -> list[float]:
        return [float(model.evaluation.scores[key][index]) for key in keys]

    return {
        "adapters": [adapter.label for adapter in comparison.adapters],
        "decimals": [_decimals(comparison, key) for key in keys],
        "pairs": [
            {
                "prompt": str(base.prompts[index]),
                "base": scores(comparison.base, index),
                "adapters": [scores(adapter, index) for adapter in comparison.adapters],
            }
            for index in chosen
        ],
    }


def _decimals(comparison: Comparison, key: str) -> int:
    """Three digits for the largest score, or four of those that are no share of one."""
    largest = max(float(model.evaluation.scores[key].abs().max()) for model in comparison.models)
    return decimals_of_scores([largest]) + (1 if 1 <= largest < 100 else 0)


def estimate_text(estimate: Estimate | None, *, sign: bool = False) -> str:
    """As `with_error`; a dash for None."""
    return UNKNOWN if estimate is None else with_error(estimate.value, estimate.error, sign=sign)


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: above it.
        columns: titles of the columns; numbers stand in all but the first two.
        rows: as many cells as columns each.
        explanation: what the columns are.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    explanation: str


def tables(comparison: Comparison) -> list[Table]:
    """Rewards; and variety with the distance to the base, where features were kept."""
    found = [_reward_table(comparison)]
    return found if comparison.varieties is None else [*found, _variety_table(comparison)]


def console_text(comparison: Comparison) -> str:
    """All tables and notes as plain text."""
    parts = ["\n".join([table.title, *aligned([table.columns, *table.rows], left=2)]) for table in tables(comparison)]
    found = "\n".join(f"- {note}" for note in notes(comparison))
    return "\n\n".join([*parts, found] if found else parts)


def markdown(comparison: Comparison) -> str:
    """All facts, notes and tables as one Markdown document."""
    facts = [f"- **{name}:** {in_text(value)}" for name, value in comparison.facts.items()]
    found = [f"- {in_text(note)}" for note in notes(comparison)]
    parts = ["# Base against adapters", "\n".join(facts), "\n".join(found)]
    for table in tables(comparison):
        parts += [f"## {table.title}", markdown_table(table), table.explanation]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """One table in GitHub's Markdown."""
    lines = ["---"] * 2 + ["---:"] * (len(table.columns) - 2)
    rows = [[in_text(cell).replace("|", "\\|") for cell in row] for row in (table.columns, lines, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _reward_table(comparison: Comparison) -> Table:
    rows = []
    for reward in comparison.rewards:
        name = f"{reward.name} (held out)" if reward.heldout else reward.name
        first = comparison.gains[0][reward.key]
        rows.append([name, comparison.base.label, with_error(first["before"], first["before_se"]), UNKNOWN, UNKNOWN])
        for adapter, gains in zip(comparison.adapters, comparison.gains, strict=True):
            values = gains[reward.key]
            gain = gain_with_error(*(values[name] for name in ("before", "after", "gain", "gain_se")))
            after = with_error(values["after"], values["after_se"])
            rows.append([name, adapter.label, after, gain, f"{values['win_rate']:.1%}"])
    count = len(comparison.base.evaluation.prompts)
    return Table(
        f"Rewards ({count} images each)",
        ("reward", "model", "mean", "paired difference", "win rate"),
        rows,
        "Mean and standard error over the images, in which the images of one prompt count together. The difference is "
        "adapter minus base at the same prompt and seed, with its paired error. The win rate is the share of images "
        "that scored higher than the base's; ties count one half.",
    )


def _variety_table(comparison: Comparison) -> Table:
    assert comparison.varieties is not None
    has_kl = any(divergence is not None for divergence in comparison.divergences)
    rows = []
    for model, found, kl in zip(comparison.models, comparison.varieties, [None, *comparison.divergences], strict=True):
        rows.append(
            [
                "",
                model.label,
                estimate_text(found.within_prompt),
                estimate_text(found.within_prompt_change, sign=True),
                estimate_text(found.overall),
                estimate_text(found.overall_change, sign=True),
                estimate_text(found.to_base),
                *([estimate_text(kl)] if has_kl else []),
            ]
        )
    kl_text = (
        " KL is the divergence of the sampled path from the base's, the closed-form KL of every step summed over the "
        "chain, in nats."
        if has_kl
        else ""
    )
    columns = ["", "model", "within a prompt", "change", "all images", "change", "to the base's image"]
    columns += ["KL (nats)"] if has_kl else []
    within = "between the images of one prompt, "
    if all(found.within_prompt is None for found in comparison.varieties):  # one image of every prompt
        columns, rows, within = columns[:2] + columns[4:], [row[:2] + row[4:] for row in rows], ""
    return Table(
        "Variety and distance to the base",
        columns,
        rows,
        f"Mean cosine distance of image features ({comparison.features}): {within}between all images, and between an "
        "image and the base's at the same prompt and seed. Less variety than the base is a sign of "
        f"collapse.{kl_text}",
    )
