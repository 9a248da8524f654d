"""Where an adapter comes from: a folder, a file, or a repository of the Hub; found before any model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rlr_peft.durable_files import stays_inside
from rlr_peft.errors import UserError
from rlr_peft.foreign_text import printable
from rlr_peft.lora.export import SECOND_EXPERT, WEIGHT_NAME
from rlr_peft.lora.tensor_files import PICKLE_ENDINGS, parsed_settings

PEFT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_SETTINGS = "adapter_config.json"

_IN_WORDS = {
    GatedRepoError: "is gated: accept its terms on the Hub and log in with `hf auth login`",
    RevisionNotFoundError: "has no such revision",
    RepositoryNotFoundError: (
        "was not found, or is private: check the name, and log in with `hf auth login` or give --hub_token"
    ),
    LocalEntryNotFoundError: "is not in the local cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set",
}


class AdapterNotFoundError(UserError, OSError):
    """There is no adapter where one was said to be."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on this machine.

    Attributes:
        place: what the user called it.
        folder: holds its file.
        weight_name: name of the file in it; with our own name the folder may hold `transformer_2/` too.
    """

    place: str
    folder: Path
    weight_name: str = WEIGHT_NAME

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        paths = [self.folder / self.weight_name]
        if self.weight_name == WEIGHT_NAME:
            paths.append(self.folder / SECOND_EXPERT / WEIGHT_NAME)
        return [path for path in paths if path.exists()]

    def settings(self) -> dict[str, Any]:
        """What peft's `save_pretrained` writes beside its file; empty for other files.

        Raises:
            AdapterFormatError: it is damaged.
        """
        path = self._settings_path
        if path is None:
            return {}
        return parsed_settings(path.read_text(errors="replace"), f"The adapter {self.place}: its {PEFT_SETTINGS}")

    @property
    def _settings_path(self) -> Path | None:
        path = self.folder / PEFT_SETTINGS
        return path if self.weight_name in PEFT_NAMES and path.exists() else None

    def fingerprint(self) -> str:
        """SHA-256 of its files: equal for equal adapters wherever they lie."""
        total = hashlib.sha256()
        for path in (*self.paths, *filter(None, [self._settings_path])):
            with path.open("rb") as file:
                total.update(path.parent.name.encode() if path.parent != self.folder else b"")
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def find_adapter(place: str, *, token: str | None = None, cache_dir: str | None = None) -> AdapterFiles:
    """Finds an adapter, and downloads it if it lies on the Hub.

    Args:
        place: a folder, a file, or a repository `user/name`, also `user/name@revision`. A folder or repository holds
            `pytorch_lora_weights.safetensors`, or a single `.safetensors` file, or a single pickle (`.bin`, `.pt`).
        token: for the Hub; None takes the one that the machine is logged in with.
        cache_dir: folder of the Hub's cache; None for the default one.

    Raises:
        AdapterNotFoundError: nothing there, nothing that is an adapter, or no access.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return AdapterFiles(place, path.parent, path.name)
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return AdapterFiles(place, path, _weight_name(place, names))
    if place.startswith(("/", ".", "~")) or place.partition("@")[0].count("/") != 1:
        raise AdapterNotFoundError(
            f"--adapter {place}: expected a folder, a .safetensors file or a Hub repository `user/name`, got a path "
            f"that does not exist (looked for it from {Path.cwd()})."
        )
    return _download(place, token, cache_dir)


def _download(place: str, token: str | None, cache_dir: str | None) -> AdapterFiles:
    repo, at, revision = place.partition("@")
    if at and not stays_inside(revision):  # it becomes a path in the Hub's cache
        raise AdapterNotFoundError(f"--adapter {place}: expected user/name@REVISION, got {revision!r}; correct it.")

    def get(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=revision or None, token=token, cache_dir=cache_dir))

    try:
        try:
            file = get(WEIGHT_NAME)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            names = HfApi(token=token).list_repo_files(repo, revision=revision or None)
            # The Hub's client shows the name while it downloads, as it is.
            file = get(_weight_name(place, sorted(name for name in names if name == printable(name))))
            if file.name in PEFT_NAMES and PEFT_SETTINGS in names:
                get(PEFT_SETTINGS)
        if file.name == WEIGHT_NAME:
            _get_second_expert(get)
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        words = next((text for kind, text in _IN_WORDS.items() if isinstance(error, kind)), f"cannot be read: {error}")
        raise AdapterNotFoundError(
            f"--adapter {place}: there is no such folder or file here, and the Hub repository {repo} {words}."
        ) from error
    return AdapterFiles(place, file.parent, file.name)


def _get_second_expert(get: Callable[[str], Path]) -> None:
    """`transformer_2/`, which most repositories do not have."""
    try:
        get(f"{SECOND_EXPERT}/{WEIGHT_NAME}")
    except EntryNotFoundError as error:
        # Where it could not be asked for, half an adapter must not pass for the whole.
        if isinstance(error, LocalEntryNotFoundError) and not is_offline_mode():
            raise


def _weight_name(place: str, names: list[str]) -> str:
    """Which of the files, named from the folder on, is the adapter."""
    if WEIGHT_NAME in names or f"{SECOND_EXPERT}/{WEIGHT_NAME}" in names:
        return WEIGHT_NAME
    if "model_index.json" in names:
        raise AdapterNotFoundError(
            f"--adapter {place}: expected an adapter, got a whole pipeline (it has a model_index.json); give it as the "
            "base."
        )
    top = [name for name in names if "/" not in name]
    found = [name for name in top if name.endswith(".safetensors")] or [
        name for name in top if name.endswith(PICKLE_ENDINGS)
    ]
    if len(found) == 1:
        return found[0]
    got = f"{len(found)} of them ({', '.join(found[:5])}): name the file" if found else "none"
    raise AdapterNotFoundError(f"--adapter {place}: expected {WEIGHT_NAME} or one .safetensors file, got {got}.")
