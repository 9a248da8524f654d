"""`run_record.json`: what a card is made of, kept beside it, so that it can be written again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rlr_peft.durable_files import replacing_file, stays_inside
from rlr_peft.errors import UserError
from rlr_peft.publishing.run_record import ImagePair, RunRecord
from rlr_peft.redaction import redacted_values

RECORD_NAME = "run_record.json"


class RecordError(UserError, ValueError):
    """The folder has no usable run record."""


@dataclass(frozen=True)
class StoredCard:
    """A card's facts and what the user added to it.

    Attributes:
        record: the run's facts.
        template: text of a template in place of the shipped one.
        extra_text: Markdown of the user's own, put after the introduction.
        readme_sha256: of the card as it was written last, by which a user's edits are noticed.
    """

    record: RunRecord
    template: str | None = None
    extra_text: str | None = None
    readme_sha256: str | None = None


def save_stored_card(directory: Path, card: StoredCard) -> Path:
    """Writes `run_record.json`; returns its path."""
    path = directory / RECORD_NAME
    with replacing_file(path) as aside:
        text = json.dumps(redacted_values(dataclasses.asdict(card)), indent=1, ensure_ascii=False)
        aside.write_text(text + "\n", encoding="utf-8")
    return path


def _check(record: RunRecord) -> None:
    """A record may have come with somebody's adapter: what becomes a path or code is a file name or a Python name.

    Raises:
        ValueError: one is not.
    """
    pairs = [name for pair in record.pairs for name in (pair.base, pair.adapter)]
    single = (record.before_after, record.reward_curve, record.weight_name)
    for name in (*(one for one in single if one is not None), *pairs, *(image for image, _ in record.images)):
        if not stays_inside(name):
            raise ValueError(f"expected the name of a file in its folder, got {name!r}")
    words = (record.inference, record.base_options, record.components, record.peft_config or ())
    for name in (record.dtype, *record.denoisers, *(key for mapping in words for key in mapping)):
        if not name.isidentifier():
            raise ValueError(f"expected a name of Python, got {name!r}")
    for number in (*record.metrics.values(), record.fps or 0):
        if not isinstance(number, (int, float)):
            raise ValueError(f"expected a number, got {number!r}")


def load_stored_card(directory: Path) -> StoredCard:
    """What `save_stored_card` wrote.

    Raises:
        RecordError: there is none, it is damaged, or another version of rlr-peft wrote it.
    """
    path = directory / RECORD_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        record = saved.pop("record")
        record["images"] = [tuple(image) for image in record["images"]]
        record["pairs"] = [ImagePair(**pair) for pair in record["pairs"]]
        card = StoredCard(record=RunRecord(**record), **saved)
        _check(card.record)
        return card
    except FileNotFoundError:
        raise RecordError(
            f"Expected {RECORD_NAME} in {directory}, as train_rlr_lora.py writes it at the end of a run, got no such "
            "file; check the path."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path} cannot be read ({error}): it is damaged, or another version of rlr-peft wrote it; use that one."
        ) from error
