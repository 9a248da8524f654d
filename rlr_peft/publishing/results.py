"""What a run measured, reward by reward, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlr_peft.foreign_text import in_code
from rlr_peft.intervals import decimals_of, direction, half_width, with_error
from rlr_peft.publishing.record import RunRecord

KEYS = ("before", "before_se", "after", "after_se", "gain", "gain_se")


@dataclass(frozen=True)
class Result:
    """One reward on base and adapter, image by image from the same noise.

    Attributes:
        name: of the reward.
        role: what part it had in training, in words.
        held_out: whether it was only measured.
        is_score: whether it is what training raised, or the first held-out reward.
        before, before_se, after, after_se: means of base and adapter, and their standard errors.
        gain, gain_se: mean of the paired differences, and its standard error.
        win_rate: share of the images that got better; None if it was not measured.
        n: images.
        count: of how many independent values the errors are: the prompts, where they are more than one.
    """

    name: str
    role: str
    held_out: bool
    is_score: bool
    before: float
    before_se: float
    after: float
    after_se: float
    gain: float
    gain_se: float
    win_rate: float | None
    n: int
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval of the gain is clear of 0, else 0."""
        return direction(self.gain, self.gain_se, self.count)

    def row(self) -> dict[str, str]:
        """The cells of the table, whose numbers do not break across lines."""
        margin, places = half_width(self.gain_se, self.count), decimals_of(self.gain_se)
        low, high = (f"{edge:+.{places}f}" for edge in (self.gain - margin, self.gain + margin))
        cells = {
            "name": in_code(self.name),
            "role": self.role,
            "before": with_error(self.before, self.before_se),
            "after": with_error(self.after, self.after_se),
            "gain": f"{self.gain:+.{places}f} [{low}, {high}]",
            "win_rate": "" if self.win_rate is None else f"{self.win_rate:.0%}",
            "n": str(self.n),
        }
        return {
            name: cell if name in ("name", "role") else cell.replace(" ", "\N{NO-BREAK SPACE}")
            for name, cell in cells.items()
        }


def results_of(record: RunRecord) -> list[Result]:
    """Every reward whose numbers are complete: the trained one and its parts, and the held-out ones.

    A reward with any of its six numbers or `n` missing is left out.
    """
    prefixes = [key.removesuffix("_gain") for key in record.metrics if key.endswith("_gain")]
    order = {"trained": 0, "part": 1, "held out": 2}
    found = [pair for prefix in prefixes if (pair := _result(record, prefix)) is not None]
    return [result for _, result in sorted(found, key=lambda pair: order[pair[0]])]


def verdicts(record: RunRecord, results: list[Result]) -> list[str]:
    """What the paired gains say, in words, and a plain warning when they say that the reward was hacked."""
    sentences = []
    scores = [result for result in results if result.is_score]
    for result in scores:
        verb = {1: "rose", -1: "fell", 0: "did not change measurably"}[result.sign]
        trained = "the weighted sum of its rewards" if record.reward_weights else "its reward"
        what = f"the held-out reward {in_code(result.name)}, never trained on," if result.held_out else trained
        gain = with_error(result.gain, result.gain_se, sign=True)
        sentences.append(f"On {record.evaluation_prompts} {what} {verb} ({gain}).")
    rose = any(result.sign == 1 for result in scores if not result.held_out)
    fallen = [result.name for result in results if result.held_out and result.sign == -1]
    if rose and fallen:
        names = " and ".join(in_code(name) for name in fallen)
        sentences.append(f"**The two disagree: this adapter probably exploits a flaw of its reward** ({names} fell).")
    return sentences


def _result(record: RunRecord, prefix: str) -> tuple[str, Result] | None:
    metrics = record.metrics
    if "n" not in metrics or any(f"{prefix}_{key}" not in metrics for key in KEYS):
        return None
    described = _described(record, prefix)
    if described is None:
        return None
    kind, name, role = described
    numbers = {key: float(metrics[f"{prefix}_{key}"]) for key in KEYS}
    return kind, Result(
        name=name,
        role=role,
        held_out=kind == "held out",
        is_score=prefix in ("reward", "heldout"),
        win_rate=metrics.get(f"{prefix}_win_rate"),
        n=int(metrics["n"]),
        count=_independent(metrics),
        **numbers,
    )


def _described(record: RunRecord, prefix: str) -> tuple[str, str, str] | None:
    """Kind, name and role of a prefix of `metrics.json`; None for what stands in the table already, or is no reward.

    What rewards tell beside their scores, such as the attributes that a judge saw, is on the comparison's page.
    """
    group, _, name = prefix.partition("/")
    if prefix == "reward":
        return (
            "trained",
            record.reward_name,
            "trained on, weighted sum of scaled rewards" if record.reward_weights else "trained on",
        )
    if prefix == "heldout":
        return None if record.heldout_name is None else ("held out", record.heldout_name, "held out")
    if group == "reward":
        weight = record.reward_weights.get(name)
        return None if weight is None else ("part", name, f"trained on, weight {weight:g}")
    if group == "heldout" and name != record.heldout_name and name in record.heldout_names:
        return "held out", name, "held out"
    return None


def _independent(metrics: Mapping[str, float]) -> int:
    """Images of one prompt are alike, and the errors take them together; of a single prompt every image counts."""
    prompts = int(metrics.get("prompts", metrics["n"]))
    return prompts if prompts > 1 else int(metrics["n"])
