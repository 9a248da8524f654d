"""What a run needs of the Hub: a checked destination, checkpoints while it trains, and the result at its end.

What cannot be published is told with the command that publishes it later.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants

from rlr_peft.config import Config
from rlr_peft.files import ADAPTER_FILES, WEIGHT_NAME
from rlr_peft.publishing.card import addressed_card, card_text, stored_record, write_card
from rlr_peft.publishing.hub_client import (
    FAILURES,
    Destination,
    HubError,
    IncompleteError,
    UncheckedError,
    in_words,
    open_destination,
    patiently,
)
from rlr_peft.publishing.uploads import compare_with_hub, is_ours, push_files, push_folder
from rlr_peft.redaction import redacted, redacted_address
from rlr_peft.reports import with_error

logger = logging.getLogger(__name__)


@contextmanager
def open_publisher(config: Config) -> Iterator[Publisher | None]:
    """Checks token, name and right to write, and creates the repository; None where this process publishes nothing.

    Raises:
        HubError: it could not be published there.
    """
    hub = config.hub
    if not hub.push_to_hub or os.environ.get("RANK", "0") != "0":
        yield None
        return
    folder = Path(config.training.output_dir)
    try:
        destination = open_destination(
            hub.hub_model_id or folder.resolve().name,
            token=hub.hub_token,
            private=hub.hub_private_repo,
            revision=hub.hub_revision,
        )
    except HubError as error:
        raise HubError(
            f"{error} Training was not started. It needs no Hub: without --push_to_hub the run stays here, and "
            f"`rlr-peft push {folder}` publishes it afterwards."
        ) from error
    logger.info("The adapter will be published on %s", destination.url)
    publisher = Publisher(destination)
    try:
        yield publisher
    finally:
        publisher.stop()


class Publisher:
    """Publishes one output folder: checkpoints in a thread while training goes on, each on a branch of its own.

    A checkpoint that cannot be published never reaches training: `finish` tells of it.

    Args:
        destination: a repository that the token may write to.
    """

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push-checkpoint")
        self._pushes: dict[Path, Future[None]] = {}
        self._copies: set[Path] = set()

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Starts, or queues, the push of a checkpoint's adapter; returns at once, whatever happens.

        Args:
            checkpoint: the folder `checkpoint-N`; its adapter is copied first, so it may be deleted.
        """
        try:
            copy = self._copy(checkpoint)
        except OSError as error:  # no space, for example: told at the end like every other failure
            push: Future[None] = Future()
            push.set_exception(HubError(in_words(error)))
        else:
            push = self._pool.submit(self._push, copy, checkpoint.name)
        self._pushes[checkpoint] = push

    def failures(self) -> dict[Path, BaseException]:
        """Waits for what is under way; checkpoint -> what went wrong, of those that were not published."""
        pending = sum(not push.done() for push in self._pushes.values())
        if pending:
            logger.info("Waiting for %d checkpoint%s to be published.", pending, "s" if pending > 1 else "")
        return {path: error for path, push in self._pushes.items() if (error := push.exception()) is not None}

    def finish(self, folder: Path) -> str:
        """Publishes the result, once the checkpoints are through; returns the last lines for the user.

        Raises:
            HubError: the result was not published; the message says how to do it later.
        """
        notes = [self._note(path, error) for path, error in self.failures().items()]
        try:
            return "\n".join([publish(folder, self.destination), *notes])
        except HubError as error:
            raise HubError("\n".join([str(error), *notes])) from error

    def stop(self) -> None:
        """Drops what is still queued; what is under way is ended by its time limits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if all(push.done() for push in self._pushes.values()):
            for copy in self._copies:
                shutil.rmtree(copy, ignore_errors=True)

    def _copy(self, checkpoint: Path) -> Path:
        for left in checkpoint.parent.glob(".checkpoint-*.push-*"):
            if left not in self._copies:  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        copy = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}.push-", dir=checkpoint.parent))
        self._copies.add(copy)
        for name in ADAPTER_FILES:
            if (checkpoint / name).exists():
                (copy / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint / name, copy / name)
        return copy

    def _push(self, copy: Path, name: str) -> None:
        try:
            destination = replace(self.destination, revision=name)
            push_checkpoint(copy, destination, name)
            logger.info("Published %s: %s", name, destination.url)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

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
    done = f"commit {pushed.commit[:8]}, {pushed.files} files" if pushed.changed else "nothing had changed"
    return f"Published on {destination.url} ({done}); the adapter was downloaded again and is the same."


def push_checkpoint(folder: Path, destination: Destination, name: str) -> None:
    """Publishes the adapter of one checkpoint, with a short card and nothing else, on the branch of the destination.

    Raises:
        HubError: it could not be published.
    """
    adapters = {file: folder / file for file in ADAPTER_FILES if (folder / file).exists()}
    if WEIGHT_NAME not in adapters:
        raise HubError(f"Expected the adapter of {name}, got a folder without {WEIGHT_NAME}; check the path.")
    api, repo_id = destination.api, destination.repo_id
    try:
        if destination.revision != constants.DEFAULT_REVISION:
            patiently(lambda: api.create_branch(repo_id, branch=destination.revision, exist_ok=True))
    except FAILURES as error:
        raise HubError(in_words(error)) from error
    contents: dict[str, bytes | Path] = {**adapters, "README.md": _card(destination, name).encode()}
    # The branch began as a copy of main: what a run made there belongs to another adapter.
    pushed = push_files(contents, destination, f"Adapter of {name}", replaced=is_ours)
    compare_with_hub(adapters, destination, pushed.commit)


def _advice(error: BaseException, folder: Path, destination: Destination) -> str:
    """What to do after a failed push, with the commands for it."""
    later = ["rlr-peft", "push", str(folder), "--hub_model_id", destination.repo_id]
    if destination.revision != constants.DEFAULT_REVISION:
        later += ["--hub_revision", destination.revision]
    again = shlex.join(later)
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
        return redacted("Upload LoRA adapter" + ("" if record is None else f" for the reward {record.rewards.name}"))

    def gain(prefix: str) -> str:
        return with_error(metrics[f"{prefix}_gain"], metrics[f"{prefix}_gain_se"], sign=True)

    message = f"Upload LoRA adapter: {record.rewards.name} {gain('reward')}"
    if record.rewards.heldout and "heldout_gain" in metrics and "heldout_gain_se" in metrics:
        message += f", held-out {record.rewards.heldout[0]} {gain('heldout')}"
    return redacted(message)


def _metrics(folder: Path) -> dict[str, float]:
    path = folder / "metrics.json"
    metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return metrics


def _card(destination: Destination, name: str) -> str:
    """On a branch of its own without metadata: the Hub reads those of the main branch."""
    title = f"# {name}\n\nThe adapter of a checkpoint, taken while training went on."
    if destination.revision == constants.DEFAULT_REVISION:
        metadata = "---\nlibrary_name: diffusers\ntags:\n- lora\n---\n\n"
        loading = f'pipe.load_lora_weights("{destination.repo_id}", weight_name="{WEIGHT_NAME}")'
        return f"{metadata}{title}\n\n```python\n{loading}\n```\n"
    main = redacted_address(f"{destination.api.endpoint}/{destination.repo_id}")
    return (
        f"{title} Its base and the way to use it are on the [main branch]({main}); add "
        f'`revision="{destination.revision}"` to `load_lora_weights`.\n'
    )
