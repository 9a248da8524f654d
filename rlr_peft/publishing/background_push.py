"""Adapters of checkpoints on their way to the Hub while training goes on."""

from __future__ import annotations

import logging
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants

from rlr_peft.publishing.hub import compare_with_hub, push_files
from rlr_peft.publishing.hub_access import WEIGHT_NAME, Destination
from rlr_peft.publishing.hub_client import FAILURES, HubError, in_words, patiently
from rlr_peft.publishing.hub_files import is_ours
from rlr_peft.redaction import redacted_address

logger = logging.getLogger(__name__)

ADAPTERS = (WEIGHT_NAME, f"transformer_2/{WEIGHT_NAME}")


class BackgroundPush:
    """Publishes adapters of checkpoints, each on a branch of its own, in a thread; failures wait to be asked for.

    A failure never reaches training: `failures` tells of it afterwards.

    Args:
        destination: the repository.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push-checkpoint")
        self._pushes: dict[Path, Future[None]] = {}
        self._copies: set[Path] = set()

    def submit(self, checkpoint: Path) -> None:
        """Starts, or queues, the push of a checkpoint; returns at once, whatever happens.

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
        for name in ADAPTERS:
            if (checkpoint / name).exists():
                (copy / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint / name, copy / name)
        return copy

    def _push(self, copy: Path, name: str) -> None:
        try:
            destination = replace(self._destination, revision=name)
            push_checkpoint(copy, destination, name)
            logger.info("Published %s: %s", name, destination.url)
        finally:
            shutil.rmtree(copy, ignore_errors=True)


def push_checkpoint(folder: Path, destination: Destination, name: str) -> None:
    """Publishes the adapter of one checkpoint, with a short card and nothing else, on the branch of the destination.

    Raises:
        HubError: it could not be published.
    """
    adapters = {file: folder / file for file in ADAPTERS if (folder / file).exists()}
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
