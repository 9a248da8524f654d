"""Publishing an output folder: one commit, then a download into an empty cache that must give the same adapter."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from rlr_peft.publishing.hub_access import Destination
from rlr_peft.publishing.hub_client import (
    FAILURES,
    HubError,
    IncompleteError,
    UncheckedError,
    in_words,
    is_missing,
    model_info,
    patiently,
    without_progress_bars,
)
from rlr_peft.publishing.hub_files import content_for_upload, is_ours, published_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    Attributes:
        commit: its id; that of the last one if nothing had changed.
        files: how many files are published.
        changed: whether a commit was made.
    """

    commit: str
    files: int
    changed: bool


def push_folder(folder: Path, destination: Destination, message: str, *, card: str | None = None) -> Pushed:
    """Uploads the folder's published files in one commit, and downloads the adapter again to compare it.

    Args:
        folder: an output folder; only files of a fixed list are taken from it.
        destination: where to.
        message: of the commit.
        card: text of `README.md` in place of the file.

    Raises:
        HubError: it could not be published. Nothing in the folder is changed.
        IncompleteError: it was, but what came back is another adapter, or nothing.
        UncheckedError: it was, but the adapter could not be downloaded to compare it.
    """
    files = published_files(folder)
    contents = {name: content_for_upload(path, destination.token) for name, path in files.items()}
    if card is not None:
        contents["README.md"] = card.encode()
    # What an earlier run left there, an image or a copy in another format, would belong to another adapter.
    pushed = push_files(contents, destination, message, replaced=is_ours)
    adapters = {name: path for name, path in files.items() if name.endswith(".safetensors")}
    compare_with_hub(adapters, destination, pushed.commit)
    return pushed


def push_files(
    contents: Mapping[str, bytes | Path],
    destination: Destination,
    message: str,
    *,
    replaced: Callable[[str], bool],
) -> Pushed:
    """One commit with these files; none if the branch is so already.

    Args:
        contents: path in the repository -> bytes or a file.
        destination: where to.
        message: of the commit.
        replaced: whether a file that is on the branch, and not among these, is deleted.
    """
    api, where = destination.api, {"repo_id": destination.repo_id, "revision": destination.revision}
    try:
        before = model_info(api, **where)
        present = {one.rfilename for one in before.siblings or ()}
        doomed = sorted(filter(replaced, present - contents.keys() - {".gitattributes"}))

        def commit() -> CommitInfo:
            # Made anew for every try; what is uploaded or committed already is found out and left out.
            add = [CommitOperationAdd(name, content) for name, content in contents.items()]
            delete = [CommitOperationDelete(name) for name in doomed]
            with warnings.catch_warnings(), without_progress_bars():
                warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
                return api.create_commit(operations=[*delete, *add], commit_message=message, **where)

        done = _over_xet_or_http(commit)
    except FAILURES as error:
        raise HubError(in_words(error)) from error
    return Pushed(done.oid, len(contents), done.oid != before.sha)


def compare_with_hub(files: Mapping[str, Path], destination: Destination, commit: str) -> None:
    """Downloads files of a commit into an empty cache and compares them byte by byte.

    Raises:
        IncompleteError: the Hub lacks one of them, or holds another file in its place.
        UncheckedError: one of them cannot be downloaded for another reason.
    """
    said = f"Commit {commit[:8]} was accepted, but"
    for name, path in files.items():
        try:
            with tempfile.TemporaryDirectory(prefix="rlr-peft-") as cache, without_progress_bars():
                copy = destination.api.hf_hub_download(destination.repo_id, name, revision=commit, cache_dir=cache)
                same = Path(copy).read_bytes() == path.read_bytes()
        except FAILURES as error:
            if is_missing(error):
                raise IncompleteError(
                    f"{said} {name} cannot be downloaded from it: {in_words(error)}", name, commit
                ) from error
            raise UncheckedError(f"{said} {name} could not be downloaded to check it: {in_words(error)}") from error
        if not same:
            raise IncompleteError(f"{said} {name} came back with other bytes than were sent.", name, commit)


def _over_xet_or_http(commit: Callable[[], CommitInfo]) -> CommitInfo:
    """hf-xet raises the built-in ConnectionError and gives up; plain HTTP often gets through where it cannot."""
    try:
        return patiently(commit)
    except ConnectionError as error:
        if constants.HF_HUB_DISABLE_XET or isinstance(error, OfflineModeIsEnabled):
            raise
        logger.warning("The Hub's Xet storage cannot be reached (%s): uploading over plain HTTP instead.", error)
        constants.HF_HUB_DISABLE_XET = True
        return patiently(commit)
