"""What all rewards with a network share: their files, and frozen weights on their device only while they are used.

Every file has an address, repository and name. A user may put a local folder (or file, or another repository) in the
place of a repository, with the same file names inside.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.scores import Info

GITHUB = "github:"  # of repositories that are not on the Hub: `github:owner/name`
SNAPSHOT = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
# Of a tokenizer and its chat template, which has its own file or not.
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json")
MODEL_FILES = ("config.json", ("model.safetensors", "pytorch_model.bin"))
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format by its name; `auto` is fp16, but on a CPU, where it is slow, fp32."""
    return _DTYPES[("fp32" if device.type == "cpu" else "fp16") if name == "auto" else name]


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
        if place.startswith(GITHUB):
            code = place.removeprefix(GITHUB)
            raise RewardError(
                f"reward '{reward_name}' needs the file {alternatives[-1]} of github.com/{code}, which is not on the "
                f"Hub. Get it with `curl -LO https://github.com/{code}/raw/main/{alternatives[-1]}`, and name it with "
                f"--reward_model_path '{{{repo}: /path/to/{Path(alternatives[-1]).name}}}'"
            )
        if place != repo:
            _check_hub_id(reward_name, f"a folder, a file or a Hub id in the place of {repo}", place)
        problem: Exception | None = None
        for name in alternatives:
            found = self._download(place, name)
            if isinstance(found, Path):
                return self._note(found)
            problem = found
            if not isinstance(problem, EntryNotFoundError):
                break
        raise RewardError(
            f"reward '{reward_name}' needs the file {alternatives[-1]} of the Hub repository {place}, which "
            f"{_in_words(problem, place)}. Get it with `hf download {place} {names}`, or name a local copy with "
            f"--reward_model_path '{{{repo}: /path/to/folder}}' ({type(problem).__name__})"
        )

    def snapshot(self, reward_name: str, repo: str) -> Path:
        """The folder of a whole model of `transformers`: its weights as safetensors, which may be many, and all texts.

        Args:
            reward_name: named in the error.
            repo: the repository, or a local folder.

        Raises:
            RewardError: as `find`.
        """
        place = self._replacements.get(repo, repo)
        folder = Path(place).expanduser()
        if not folder.is_dir():
            _check_hub_id(reward_name, "a folder or a Hub id", place)
            try:
                folder = Path(snapshot_download(place, cache_dir=self._cache_dir, allow_patterns=SNAPSHOT))
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                raise RewardError(
                    f"reward '{reward_name}' needs the Hub repository {place}, which {_in_words(error, place)}. Get it "
                    f"with `hf download {place}`, or name a local copy with --reward_model_path "
                    f"'{{{repo}: /path/to/folder}}' ({type(error).__name__})"
                ) from None
        for file in folder.iterdir():
            if file.is_file():
                self._note(file)
        return folder

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


def depth_of(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks a network has whose weights are called `{prefix}{number}.`."""
    numbers = (int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix))
    return 1 + max(numbers, default=0)


def _check_hub_id(reward_name: str, expected: str, place: str) -> None:
    if place.startswith(("/", ".", "~")) or place.count("/") != 1:
        raise RewardError(
            f"reward '{reward_name}': expected {expected}, got {place}, which does not exist (looked for it from "
            f"{Path.cwd()})"
        )


def _in_words(problem: Exception | None, place: str) -> str:
    reason = "cannot be read: " + next(iter(str(problem).splitlines()), "")
    return next((text.format(repo=place) for kind, text in _IN_WORDS.items() if isinstance(problem, kind)), reason)


_LAYER = re.compile(r"layers\.(\d+)\.weight")


class LinearHead(nn.Module):
    """Linear layers one after the other, (B, D) -> (B,); their numbers are those of the checkpoint.

    Args:
        reward_name: named in errors.
        path: of the checkpoint, named in errors.
        weights: `layers.N.weight` (out, in) and `layers.N.bias` (out,).
        width: D, of the features that it will get.

    Raises:
        RewardError: weights are missing or unknown, or for features of another width.
    """

    def __init__(self, reward_name: str, path: Path, weights: Mapping[str, Tensor], width: int) -> None:
        super().__init__()
        numbers = sorted(int(match[1]) for match in map(_LAYER.fullmatch, weights) if match)
        self.layers = nn.ModuleDict(
            {
                str(n): nn.Linear(weights[f"layers.{n}.weight"].shape[1], weights[f"layers.{n}.weight"].shape[0])
                for n in numbers
            }
        )
        loaded = self.load_state_dict(dict(weights), strict=False)
        check_keys(
            reward_name, path, loaded.missing_keys or ([] if numbers else ["layers.0.weight"]), loaded.unexpected_keys
        )
        expected = self.layers[str(numbers[0])].in_features
        if expected != width:
            raise RewardError(
                f"reward '{reward_name}': {path} is a head for features of {expected} numbers, but the model before it "
                f"gives {width}; take the head and the model that belong together"
            )

    def forward(self, features: Tensor) -> Tensor:
        """(B,) in the features' dtype."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)


def unit(features: Tensor) -> Tensor:
    """Features (B, D) of length 1, in float32."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class ModelSettings:
    """How a reward's network is held.

    Attributes:
        device: where it runs.
        dtype: of its weights; preprocessing and the score itself are float32 always.
        offload: keep it in CPU memory between uses.
        files: where its files come from.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    offload: bool = False
    files: ModelFiles = field(default_factory=ModelFiles)


class ModelReward(Reward):
    """A reward with a network; subclasses name it, load it and say how it scores.

    With `offload` the network is on its device from a call until its scores are differentiated, or only during the
    call if they cannot be: it is never there while a denoiser runs.
    """

    differentiable = True
    network: Any  # a module with a `config`

    def __init__(self, name: str, settings: ModelSettings, network: nn.Module) -> None:
        self.name = name
        self.settings = settings
        self.network = network.eval().requires_grad_(False)
        self._place(torch.device("cpu") if settings.offload else settings.device)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        """Scores on the images' device, differentiable with respect to the images.

        Raises:
            RewardError: the network does not fit into the device's memory.
        """
        settings = self.settings
        # A view of its own, whose gradient is the last thing that the backward pass needs the network for.
        pixels = images.to(settings.device, torch.float32).view_as(images)
        is_differentiated = pixels.requires_grad and torch.is_grad_enabled()
        if settings.offload and is_differentiated:
            pixels.register_hook(lambda gradient: self._place(torch.device("cpu")))
        self._place(settings.device)
        returned = self.score(pixels, prompts, metadata)
        scores, info = (returned, {}) if isinstance(returned, Tensor) else returned
        if settings.offload and not is_differentiated:
            self._place(torch.device("cpu"))
        return Scored(scores.float().to(images.device), info={name: values.cpu() for name, values in info.items()})

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor | tuple[Tensor, Info]:
        """(B,) scores of (B, 3, H, W) float32 images on the network's device, of B prompts and their metadata.

        With them, if there are any, numbers that are only logged.
        """

    def _place(self, device: torch.device) -> None:
        try:
            self.network.to(device)
        except torch.OutOfMemoryError as error:
            size = sum(p.numel() * p.element_size() for p in self.network.parameters()) / 2**30
            raise RewardError(
                f"reward '{self.name}': its {size:.1f} GiB of weights do not fit into the memory of {device}; "
                "keep rewards on the CPU between uses with --offload_rewards, or halve weights in fp32 with "
                "--reward_dtype fp16"
            ) from error


class SeeingReward(ModelReward):
    """A `ModelReward` whose network also gives features of images, by which sets of images can be compared."""

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32 on the images' device, without gradient, of (B, 3, H, W) images in [0, 1]."""
        settings = self.settings
        self._place(settings.device)
        with torch.no_grad():
            features = self.features(images.to(settings.device, torch.float32)).float()
        if settings.offload:
            self._place(torch.device("cpu"))
        return features.to(images.device)

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(B, D) features of (B, 3, H, W) float32 images on the network's device."""


@contextmanager
def loading(reward_name: str, path: Path) -> Iterator[None]:
    """Silences what transformers says about a checkpoint that holds more than the part which is loaded.

    Raises:
        RewardError: instead of whatever a damaged or foreign checkpoint makes the libraries raise.
    """
    from transformers.utils import logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise RewardError(
            f"reward '{reward_name}': {path} cannot be loaded ({type(error).__name__}: {first_line}); it is damaged or "
            "another model: get it again"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
