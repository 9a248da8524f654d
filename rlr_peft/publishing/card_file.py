"""The card in a run's folder: written, written again, and addressed to a repository, without losing a user's edits."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path

from rlr_peft.publishing.model_card import render_card, write_model_card
from rlr_peft.publishing.record_file import RECORD_NAME, RecordError, StoredCard, load_stored_card, save_stored_card
from rlr_peft.publishing.run_record import RunRecord

logger = logging.getLogger(__name__)


EDITED = "README.edited.md"


def write_card(directory: Path, card: StoredCard) -> Path:
    """Writes `run_record.json` and `README.md` into the folder; returns the path of the card.

    A card that was edited by hand since is kept as `README.edited.md`.
    """
    _keep_edited(directory)
    path = write_model_card(directory, record=card.record, template=card.template, extra_text=card.extra_text)
    save_stored_card(directory, replace(card, readme_sha256=_sha256(path)))
    return path


def card_text(directory: Path, card: StoredCard) -> str:
    """What `write_card` would write into `README.md`."""
    return render_card(directory, record=card.record, template=card.template, extra_text=card.extra_text)


def stored_record(directory: Path) -> RunRecord | None:
    """The facts of the run in this folder; None if it has none, as the folder of a checkpoint."""
    return load_stored_card(directory).record if (directory / RECORD_NAME).exists() else None


def addressed_card(directory: Path, repo_id: str, revision: str | None = None) -> StoredCard | None:
    """The folder's card with a snippet that loads from this repository, and this branch of it; nothing is written.

    None where the card stays as it is: it was edited by hand, is not from here, or names the place already.
    """
    readme = directory / "README.md"
    if not (directory / RECORD_NAME).exists() or not readme.exists():
        return None
    card = load_stored_card(directory)
    if (card.record.repo_id, card.record.hub_revision) == (repo_id, revision):
        return None
    if _sha256(readme) != card.readme_sha256:
        logger.warning("%s was edited: it is published as it is; its snippet may name another place.", readme)
        return None
    return replace(card, record=replace(card.record, repo_id=repo_id, hub_revision=revision))


def _keep_edited(directory: Path) -> None:
    readme = directory / "README.md"
    if not readme.exists() or not (directory / RECORD_NAME).exists():
        return
    try:
        written = load_stored_card(directory).readme_sha256
    except RecordError:  # of another version: whether it was edited is not known
        written = None
    if _sha256(readme) != written:
        os.replace(readme, directory / EDITED)
        logger.warning("%s was edited by hand: that card is now %s.", readme, EDITED)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
