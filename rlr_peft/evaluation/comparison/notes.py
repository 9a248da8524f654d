"""What a reader should notice first: gains that hold, reward hacking, collapse, adapters without effect."""

from __future__ import annotations

from rlr_peft.estimates import direction, with_error
from rlr_peft.evaluation.comparison.comparison import Comparison, MeasuredReward

# Less variety is worth a word from this share on: every adapter that sharpens costs a little.
NOTABLE_LOSS = 0.1
COLLAPSED = 0.6
COLLAPSE = "a collapse"
# Where the base is often wrong, drawing what is asked is less varied too.
LESS_VARIETY = "variety was lost, or mistakes were mended"


def notes(comparison: Comparison) -> list[str]:
    """One sentence or two per finding, for people; empty where nothing stands out."""
    found = []
    for index, adapter in enumerate(comparison.adapters):
        if comparison.draws_as_the_base(index):
            found.append(
                f"{adapter.label} draws exactly the base's images: it has no effect. It may be untrained, or scaled to "
                "zero."
            )
            continue
        found += [f"{adapter.label}: {sentence}" for sentence in _of_adapter(comparison, index)]
    return found


def _of_adapter(comparison: Comparison, index: int) -> list[str]:
    gains = comparison.gains[index]
    count = comparison.independent_images
    signs = {r.key: direction(gains[r.key]["gain"], gains[r.key]["gain_se"], count) for r in comparison.rewards}
    rose, fell = ([r for r in comparison.rewards if signs[r.key] == sign] for sign in (1, -1))
    trained, heldout_rose = _names(rose, heldout=False), _names(rose, heldout=True)
    trained_fell, heldout_fell = _names(fell, heldout=False), _names(fell, heldout=True)
    sentences = []
    if trained and heldout_fell:
        sentences.append(
            f"{_listed(trained)} rose while {_listed(heldout_fell)}, held out, fell: the mark of reward hacking. "
            "Look at the worst cases."
        )
    elif trained and heldout_rose:
        sentences.append(f"{_listed(trained)} rose, and so did {_listed(heldout_rose)}, held out.")
    elif trained and any(reward.heldout for reward in comparison.rewards):
        sentences.append(f"{_listed(trained)} rose; no held-out reward moved clearly.")
    elif trained:
        sentences.append(f"{_listed(trained)} rose; no held-out reward was measured to confirm it.")
    elif heldout_rose:
        sentences.append(f"{_listed(heldout_rose)} rose, which is held out.")
    fallen = trained_fell if trained else trained_fell + heldout_fell
    if fallen:
        sentences.append(f"{_listed(fallen)} fell.")
    if not rose and not fell:
        sentences.append("no reward moved clearly: the 95 % intervals hold 0.")
    return sentences + _variety_notes(comparison, index)


def _variety_notes(comparison: Comparison, index: int) -> list[str]:
    if comparison.varieties is None:
        return []
    base, adapter = comparison.varieties[0], comparison.varieties[index + 1]
    sentences = []
    for words, before, change in (
        ("images of one prompt", base.within_prompt, adapter.within_prompt_change),
        ("all images", base.overall, adapter.overall_change),
    ):
        if before is None or change is None or before.value <= 0:
            continue
        loss = -change.value / before.value
        if loss > NOTABLE_LOSS and direction(change.value, change.error, change.count) < 0:
            sentences.append(
                f"{words} differ {loss:.0%} less from each other than the base's, whose distance is "
                f"{with_error(before.value, before.error)}: {COLLAPSE if loss > COLLAPSED else LESS_VARIETY}."
            )
    return sentences


def _names(rewards: list[MeasuredReward], heldout: bool) -> list[str]:
    return [reward.name for reward in rewards if reward.heldout == heldout]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
