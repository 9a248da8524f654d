"""A comparison: what base and adapters drew from the same prompts and seeds, and what a reader should notice first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from rlr_peft.compare.distances import Estimate, Variety, estimate_of, variety
from rlr_peft.compare.evaluation import Evaluation, independent_groups, paired_gains
from rlr_peft.config import ConfigError
from rlr_peft.foreign_text import listed, one_line
from rlr_peft.prompt import texts_of
from rlr_peft.reports import direction, half_width, with_error


@dataclass(frozen=True)
class MeasuredReward:
    """A reward of the comparison.

    Attributes:
        key: its name in `Evaluation.scores`.
        name: its name for people.
        heldout: whether it was never trained on.
    """

    key: str
    name: str
    heldout: bool = False


@dataclass(frozen=True)
class Model:
    """The base, or the base with one adapter.

    Attributes:
        label: its name for people, different from the others'.
        evaluation: what it drew, with pictures.
        divergence: KL of sampled paths from the base's in nats, (k,); None where it was not measured.
        image_files: the images' files relative to the report; empty where they are not kept.
    """

    label: str
    evaluation: Evaluation
    divergence: Tensor | None = None
    image_files: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Base and adapters on the same prompts and seeds.

    Attributes:
        rewards: those of the evaluations; the first one decides which images are shown first.
        base: without an adapter.
        adapters: one or more.
        facts: what was compared, in words and without a path of this machine.
        features: by what variety is measured, in words; None if it is not.

    Raises:
        ValueError: no adapter, labels that are not different, or evaluations of different prompts or seeds.
    """

    rewards: Sequence[MeasuredReward]
    base: Model
    adapters: Sequence[Model]
    facts: Mapping[str, str] = field(default_factory=dict)
    features: str | None = None

    def __post_init__(self) -> None:
        labels = [model.label for model in self.models]
        if not self.adapters or len(set(labels)) < len(labels):
            raise ValueError(f"expected one or more adapters with labels of their own, got {', '.join(labels)}")
        known = self.base.evaluation.scores
        missing = [reward.key for reward in self.rewards if reward.key not in known]
        if missing or not self.rewards:
            raise ValueError(f"expected rewards of the evaluations ({', '.join(known)}), got {', '.join(missing)}")
        _ = self.gains  # refuses different prompts and seeds

    @property
    def models(self) -> list[Model]:
        """Base first."""
        return [self.base, *self.adapters]

    @property
    def independent_images(self) -> int:
        """Of how many independent values the errors are: the prompts, or the images of a single one."""
        return max(independent_groups(texts_of(self.base.evaluation.prompts))) + 1

    @cached_property
    def gains(self) -> list[dict[str, dict[str, float]]]:
        """For every adapter the paired comparison with the base, see `paired_gains`."""
        return [paired_gains(self.base.evaluation, adapter.evaluation) for adapter in self.adapters]

    @cached_property
    def varieties(self) -> list[Variety] | None:
        """Of base and adapters; None where no features were kept."""
        if any(model.evaluation.features is None for model in self.models):
            return None
        base = self.base.evaluation
        of_base = variety(_features(base), texts_of(base.prompts))
        of_adapters = [variety(_features(a.evaluation), texts_of(base.prompts), _features(base)) for a in self.adapters]
        return [of_base, *of_adapters]

    @cached_property
    def divergences(self) -> list[Estimate | None]:
        """For every adapter the mean KL from the base in nats; None where it was not measured."""
        return [None if a.divergence is None else estimate_of(a.divergence) for a in self.adapters]

    @property
    def attributes(self) -> dict[str, list[str]]:
        """For every reward that gives numbers beside its score, their names in the comparison."""
        names = [name for name in self.base.evaluation.info if all(name in gains for gains in self.gains)]
        by_reward = {reward.key: [n for n in names if n.startswith(f"{reward.key}/")] for reward in self.rewards}
        return {key: found for key, found in by_reward.items() if found}

    def draws_as_the_base(self, index: int) -> bool:
        """Whether every picture of an adapter is the base's, bit for bit: an adapter without any effect."""
        base, adapter = self.base.evaluation.pictures, self.adapters[index].evaluation.pictures
        return bool(base) and [picture.data for picture in base] == [picture.data for picture in adapter]


def _features(evaluation: Evaluation) -> Tensor:
    assert evaluation.features is not None
    return evaluation.features


BASE = "base"  # the base's label
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
            f"{listed(trained)} rose while {listed(heldout_fell)}, held out, fell: the mark of reward hacking. "
            "Look at the worst cases."
        )
    elif trained and heldout_rose:
        sentences.append(f"{listed(trained)} rose, and so did {listed(heldout_rose)}, held out.")
    elif trained and any(reward.heldout for reward in comparison.rewards):
        sentences.append(f"{listed(trained)} rose; no held-out reward moved clearly.")
    elif trained:
        sentences.append(f"{listed(trained)} rose; no held-out reward was measured to confirm it.")
    elif heldout_rose:
        sentences.append(f"{listed(heldout_rose)} rose, which is held out.")
    fallen = trained_fell if trained else trained_fell + heldout_fell
    if fallen:
        sentences.append(f"{listed(fallen)} fell.")
    if not rose and not fell:
        intervals = listed([f"{r.name} {_interval(gains[r.key], count)}" for r in comparison.rewards])
        sentences.append(f"no reward changed clearly, as every 95 % interval of a gain contains 0: {intervals}.")
    return sentences + _variety_notes(comparison, index)


def _interval(gain: Mapping[str, float], count: int) -> str:
    """`-0.012 to +0.043`; the gain alone where its error is not known."""
    value, width = gain["gain"], half_width(gain["gain_se"], count)
    return f"{value - width:+.3g} to {value + width:+.3g}" if width > 0 else f"{value:+.3g}"


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


def unique_labels(places: Sequence[str]) -> list[str]:
    """The last parts of paths or repositories, as many as it takes to tell them apart.

    Raises:
        ConfigError: one adapter twice.
    """
    parts = [Path(place).parts if Path(place).exists() else tuple(place.split("/")) for place in places]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"--adapter: expected different adapters, got {', '.join(places)}.")
    labels: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        labels = [one_line("/".join(part[-length:]).removesuffix(".safetensors")) for part in parts]
        if len({*labels, BASE}) == len(labels) + 1:
            return labels
    return [f"{label} ({index + 1})" for index, label in enumerate(labels)]


def file_name(label: str) -> str:
    """The label without what a file name cannot hold."""
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in label)[:60]
