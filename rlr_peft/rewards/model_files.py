"""Where the files of reward models come from: the Hub's cache, the Hub, or a local copy; and what to do if they do not.

Every file has an address, repository and name. A user may put a local folder (or file, or another repository) in the
place of a repository, with the same file names inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file

from rlr_peft.rewards.errors import RewardError

_IN_WORDS = {
    GatedRepoError: "is gated: accept its terms on https://huggingface.co/{repo} and log in with `hf auth login`",
    RepositoryNotFoundError: "was not found, or is private: check the name, or log in with `hf auth login`",
    LocalEntryNotFoundError: "is not in the local cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set",
    EntryNotFoundError: "has no such file",
}


class ModelFiles:
    """Finds the files of Hub repositories.

    Args:
        replacements: repository -> local folder, local file or another repository to use in its place.
        cache_dir: folder of the Hub's cache; None for the default one.
    """

    def __init__(self, replacements: Mapping[str, str] | None = None, cache_dir: str | None = None) -> None:
        self._replacements = dict(replacements or {})
        self._cache_dir = cache_dir
        self._found: set[Path] = set()

    def identity(self) -> list[Any]:
        """Of all files that were found, in plain values: the Hub's cache names a file after its contents; of others the
        size and the time of change count too."""
        files = [(path, path.resolve(), path.stat()) for path in sorted(self._found)]
        return [[path.name, place.name, stat.st_size, stat.st_mtime_ns] for path, place, stat in files]

    def find(self, reward_name: str, repo: str, *alternatives: str, beside: Sequence[str] = ()) -> Path:
        """One file: the first of the alternatives that there is.

        Args:
            reward_name: named in the error.
            repo: the repository.
            alternatives: file names, the preferred first; the last one is certain to be in the repository.
            beside: what else is needed of the repository, for the command in the error.

        Raises:
            RewardError: missing, gated or unreachable; it names reward, repository, file and the command to get it.
        """
        place = self._replacements.get(repo, repo)
        names = " ".join(beside or alternatives[-1:])
        path = Path(place).expanduser()
        if path.is_file():
            return self._note(path)
        if path.is_dir():
            for name in alternatives:
                if (path / name).is_file():
                    return self._note(path / name)
            raise RewardError(
                f"reward '{reward_name}': expected {' or '.join(alternatives)} in {path}, which stands for {repo}; "
                f"get it with `hf download {repo} {names} --local-dir {path}`"
            )
        if place != repo and not _is_hub_id(place):
            raise RewardError(
                f"reward '{reward_name}': expected a folder, a file or a Hub id in the place of {repo}, got {place}, "
                f"which does not exist (looked for it from {Path.cwd()})"
            )
        problem: Exception | None = None
        for name in alternatives:
            found = self._download(place, name)
            if isinstance(found, Path):
                return self._note(found)
            problem = found
            if not isinstance(problem, EntryNotFoundError):
                break
        reason = "cannot be read: " + next(iter(str(problem).splitlines()), "")
        words = next((text.format(repo=place) for kind, text in _IN_WORDS.items() if isinstance(problem, kind)), reason)
        raise RewardError(
            f"reward '{reward_name}' needs the file {alternatives[-1]} of the Hub repository {place}, which "
            f"{words}. Get it with `hf download {place} {names}`, or name a local copy with "
            f"--reward_model_path '{{{repo}: /path/to/folder}}' ({type(problem).__name__})"
        )

    def folder(self, reward_name: str, repo: str, *files: str | tuple[str, ...]) -> Path:
        """The folder that holds all these files of a repository; a tuple is of alternatives, as for `find`.

        Raises:
            RewardError: as `find`.
        """
        wanted = [(file,) if isinstance(file, str) else file for file in files]
        beside = [alternatives[0] for alternatives in wanted]
        found = [self.find(reward_name, repo, *alternatives, beside=beside) for alternatives in wanted]
        return found[0].parent

    def _note(self, path: Path) -> Path:
        self._found.add(path)
        return path

    def _download(self, place: str, name: str) -> Path | Exception:
        try:
            return Path(hf_hub_download(place, name, cache_dir=self._cache_dir))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            return error


def load_weights(reward_name: str, path: Path) -> dict[str, Any]:
    """The tensors of a `.safetensors` file, or of a pickled one read with `weights_only=True`, on the CPU.

    Raises:
        RewardError: the file is damaged, or holds more than weights.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise RewardError(
            f"reward '{reward_name}': {path} cannot be read as weights ({type(error).__name__}: {first_line}); it is "
            "damaged or holds more than weights: get it again"
        ) from None
    if not isinstance(loaded, dict):
        raise RewardError(
            f"reward '{reward_name}': expected weights by name in {path}, got {type(loaded).__name__}; it is another "
            "file: get it again"
        )
    return loaded


def check_keys(reward_name: str, path: Path, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises RewardError unless a checkpoint held exactly what the model needs."""
    if missing or unexpected:
        raise RewardError(
            f"reward '{reward_name}': {path} is not the checkpoint that was expected: {len(missing)} weights missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unknown ({', '.join(unexpected[:3])})"
        )


def _is_hub_id(place: str) -> bool:
    return not place.startswith(("/", ".", "~")) and place.count("/") == 1
