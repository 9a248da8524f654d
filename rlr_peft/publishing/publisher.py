"""What a run needs of the Hub: checkpoints while it trains, and the result at its end, or how to publish it later."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants

from rlr_peft.intervals import with_error
from rlr_peft.publishing.background_push import BackgroundPush, push_checkpoint
from rlr_peft.publishing.card_file import addressed_card, card_text, stored_record, write_card
from rlr_peft.publishing.hub import Pushed, push_folder
from rlr_peft.publishing.hub_access import Destination
from rlr_peft.publishing.hub_client import HubError, IncompleteError, UncheckedError
from rlr_peft.redaction import redacted

logger = logging.getLogger(__name__)


class Publisher:
    """Publishes one output folder.

    Args:
        destination: a repository that the token may write to.
    """

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self._background = BackgroundPush(destination)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Publishes a checkpoint's adapter on the branch `checkpoint-N`, without waiting for it."""
        self._background.submit(checkpoint)

    def stop(self) -> None:
        """To be called where a run ends without a result."""
        self._background.stop()

    def finish(self, folder: Path) -> str:
        """Publishes the result, once the checkpoints are through; returns the last lines for the user.

        Raises:
            HubError: the result was not published; the message says how to do it later.
        """
        failed = self._background.failures()
        notes = [self._note(path, error) for path, error in failed.items()]
        try:
            return "\n".join([publish(folder, self.destination), *notes])
        except HubError as error:
            raise HubError("\n".join([str(error), *notes])) from error

    def _note(self, checkpoint: Path, error: BaseException) -> str:
        is_there = isinstance(error, (UncheckedError, IncompleteError))
        outcome = "was published, but is not known to be whole" if is_there else "was not published"
        advice = "It was deleted since (--checkpoints_total_limit)."
        if checkpoint.exists():
            advice = _advice(error, checkpoint, replace(self.destination, revision=checkpoint.name))
        return f"{checkpoint.name} {outcome}: {error} {advice}"


def publish(folder: Path, destination: Destination) -> str:
    """Publishes an output folder, its card addressed to the repository, and checks it; returns a line for the user.

    Raises:
        HubError: it was not published; the message says how to do it later.
    """
    try:
        if is_checkpoint(folder):
            push_checkpoint(folder, destination, folder.resolve().name)
            return f"Published on {destination.url}; the adapter was downloaded again and is the same."
        branch = None if destination.revision == constants.DEFAULT_REVISION else destination.revision
        card = addressed_card(folder, destination.repo_id, branch)
        text = None if card is None else card_text(folder, card)
        pushed = push_folder(folder, destination, commit_message(folder), card=text)
    except HubError as error:
        outcome, doubt = "not published on", ""
        if isinstance(error, UncheckedError):
            outcome, doubt = "published on", ", and could not be checked"
        elif isinstance(error, IncompleteError):
            outcome = "not published whole on"
        raise HubError(
            f"The adapter was {outcome} {destination.url}{doubt}: {error} Nothing is lost, everything is in {folder}. "
            f"{_advice(error, folder, destination)}"
        ) from error
    if card is not None:
        write_card(folder, card)
    return _in_words(pushed, destination)


def _advice(error: BaseException, folder: Path, destination: Destination) -> str:
    """What to do after a failed push, with the commands for it."""
    again = _later(folder, destination, destination.revision)
    if isinstance(error, IncompleteError):
        words = ["hf", "repos", "delete-files", destination.repo_id, error.name, "--revision", destination.revision]
        return (
            "Pushing again as it is would find nothing changed and send nothing. Look at "
            f"{destination.tree(error.commit)}; then take the file out of the Hub and send it anew:\n"
            f"  {shlex.join(words)}\n  {again}\n"
            "If it is missing again, the Hub's storage has lost it: tell who runs that Hub, and publish under another "
            "--hub_model_id meanwhile."
        )
    if isinstance(error, UncheckedError):
        return f"Once the reason is mended, this compares what is there, and sends only what is not:\n  {again}"
    return f"Publish it with\n  {again}"


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a training state, of which the adapter alone is published."""
    return (folder / "manifest.json").exists() and (folder / "optimizer.pt").exists()


def commit_message(folder: Path) -> str:
    """States the gain of the reward, with its standard error, if it was measured."""
    record, metrics = stored_record(folder), _metrics(folder)
    if record is None or "reward_gain" not in metrics or "reward_gain_se" not in metrics:
        return redacted("Upload LoRA adapter" + ("" if record is None else f" for the reward {record.reward_name}"))

    def gain(prefix: str) -> str:
        return with_error(metrics[f"{prefix}_gain"], metrics[f"{prefix}_gain_se"], sign=True)

    message = f"Upload LoRA adapter: {record.reward_name} {gain('reward')}"
    if record.heldout_name and "heldout_gain" in metrics and "heldout_gain_se" in metrics:
        message += f", held-out {record.heldout_name} {gain('heldout')}"
    return redacted(message)


def _metrics(folder: Path) -> dict[str, float]:
    path = folder / "metrics.json"
    metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return metrics


def _in_words(pushed: Pushed, destination: Destination) -> str:
    done = f"commit {pushed.commit[:8]}, {pushed.files} files" if pushed.changed else "nothing had changed"
    return f"Published on {destination.url} ({done}); the adapter was downloaded again and is the same."


def _later(folder: Path, destination: Destination, revision: str) -> str:
    words = ["rlr-peft", "push", str(folder), "--hub_model_id", destination.repo_id]
    if revision != constants.DEFAULT_REVISION:
        words += ["--hub_revision", revision]
    return shlex.join(words)
