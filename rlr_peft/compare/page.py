"""The comparison as one page that needs nothing but itself: pairs with a slider, tables, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from rlr_peft.compare.comparison import Comparison, notes
from rlr_peft.compare.evaluation import SMALL_SIDE
from rlr_peft.compare.figures import inline_svg
from rlr_peft.compare.tables import tables
from rlr_peft.foreign_text import inside_script, listed, page_environment
from rlr_peft.intervals import decimals_of_scores

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


@dataclass(frozen=True)
class _Card:
    """One pair on the page; `base` and `adapters` are data URIs, `place` is that among the pairs as they were drawn."""

    place: int
    prompt: str
    seed: int
    base: str
    adapters: list[str]
    width: int
    height: int
    small: bool


def page(comparison: Comparison, drawn: dict[str, Figure]) -> str:
    """The HTML.

    Raises:
        ValueError: the comparison was evaluated without pictures.
    """
    if not all(model.evaluation.pictures for model in comparison.models):
        raise ValueError("expected evaluations with pictures: evaluate(..., with_pictures=True)")
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
        return f"All {total}, worst cases first."
    where = " All of them are in the folder images." if comparison.base.image_files else ""
    return (
        f"{len(chosen)} of {total}, worst cases first: those that lost most, those that gained most and the first "
        f"ones.{where}"
    )


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
    )


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
