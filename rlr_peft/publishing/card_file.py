"""The card in a run's folder: written, written again, and addressed to a repository, without losing a user's edits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from rlr_peft.publishing.model_card import render_card, write_model_card
from rlr_peft.publishing.record_file import RECORD_NAME, StoredCard, load_stored_card, save_stored_card
from rlr_peft.publishing.run_record import RunRecord

logger = logging.getLogger(__name__)


def write_card(directory: Path, card: StoredCard) -> Path:
    """Writes `run_record.json` and `README.md` into the folder; returns the path of the card."""
    save_stored_card(directory, card)
    return write_model_card(directory, record=card.record, template=card.template, extra_text=card.extra_text)


def stored_record(directory: Path) -> RunRecord | None:
    """The facts of the run in this folder; None if it has none, as the folder of a checkpoint."""
    return load_stored_card(directory).record if (directory / RECORD_NAME).exists() else None


def address_card(directory: Path, repo_id: str) -> None:
    """Makes the card's snippet load from this repository.

    A card that was edited by hand, or is not from here, stays as it is.
    """
    readme = directory / "README.md"
    if not (directory / RECORD_NAME).exists() or not readme.exists():
        return
    card = load_stored_card(directory)
    if card.record.repo_id == repo_id:
        return
    text = render_card(directory, record=card.record, template=card.template, extra_text=card.extra_text)
    if readme.read_text(encoding="utf-8") != text:
        logger.warning("%s was edited: it is published as it is; its snippet may name another place.", readme)
        return
    write_card(directory, replace(card, record=replace(card.record, repo_id=repo_id)))
