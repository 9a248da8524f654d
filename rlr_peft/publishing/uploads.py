"""Uploads an output folder: one commit, then a download into an empty cache that must give the same adapter.

What may go is a list; secrets may not.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, constants, get_token
from huggingface_hub.errors import OfflineModeIsEnabled

from rlr_peft.files import ADAPTER_FILES, KOHYA_NAME, WEIGHT_NAME
from rlr_peft.publishing.hub_client import (
    FAILURES,
    Destination,
    HubError,
    IncompleteError,
    UncheckedError,
    in_words,
    is_missing,
    model_info,
    patiently,
    without_progress_bars,
)
from rlr_peft.redaction import redacted

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


# Nothing else ever leaves the folder: no checkpoint, no optimiser state, no logs.
PUBLISHED = (
    *ADAPTER_FILES,
    KOHYA_NAME,
    "README.md",
    "before_after.png",
    "reward_curve.png",
    "images/*.png",
    "images/*.gif",
    "images/*.mp4",
    "config.yaml",
    "metrics.json",
    "metrics.jsonl",
    "scores.parquet",
    "compare.html",
)
CARD_IMAGES = ("validation", "base", "adapter", "condition")
# What a run itself makes: on the Hub these files are an earlier run's where this one lacks them, all others the user's.
MADE = (
    *(name for name in PUBLISHED if "*" not in name),
    *(f"images/{kind}_*.{suffix}" for kind in CARD_IMAGES for suffix in ("png", "gif", "mp4")),
)
TEXT_SUFFIXES = (".md", ".yaml", ".json", ".jsonl", ".html")


def published_files(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, of everything in the folder that is published.

    Raises:
        HubError: the folder holds no adapter, or a link that leads out of it.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in PUBLISHED
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    if WEIGHT_NAME not in files:
        raise HubError(
            f"Expected an output folder of train_rlr_lora.py with {WEIGHT_NAME}, got {folder}; check the path."
        )
    for path in files.values():  # a folder from elsewhere would publish any file of this machine
        if not path.resolve().is_relative_to(folder.resolve()):
            raise HubError(f"{path} is a link to {path.resolve()}, outside of the folder; put the file itself there.")
    return files


def is_ours(name: str) -> bool:
    """Whether a file on the Hub is one that a run made."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in MADE)


def tokens_in_use(token: str | None) -> list[str]:
    """The tokens that are in use; of any length, so that one of an unusual form does not slip through."""
    return [secret for secret in dict.fromkeys((token, get_token())) if secret]


def content_for_upload(path: Path, token: str | None) -> bytes | Path:
    """The file, or of a text file that holds secrets its text with them crossed out.

    Raises:
        HubError: another file holds the access token.
    """
    content, secrets = path.read_bytes(), tokens_in_use(token)
    if path.suffix in TEXT_SUFFIXES:
        text = content.decode(errors="surrogateescape")
        hidden = redacted(text, secrets)
        return path if hidden == text else hidden.encode(errors="surrogateescape")
    if any(secret.encode() in content for secret in secrets):
        raise HubError(f"{path} holds the access token and is not published: remove the token from it.")
    return path
