"""What all rewards with a network share: reading weights, and holding them on their device only while they are used."""

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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlr_peft.config.model import DTYPE_NAMES
from rlr_peft.errors import RewardError
from rlr_peft.rewards.base import Metadata, Reward, Scored
from rlr_peft.rewards.model_files import ModelFiles
from rlr_peft.rewards.scores import Info


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format by its name; `auto` is fp16, but on a CPU, where it is slow, fp32."""
    chosen = ("fp32" if device.type == "cpu" else "fp16") if name == "auto" else name
    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[chosen])
    return dtype


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
        fps: frames a second of the videos that it sees.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    offload: bool = False
    files: ModelFiles = field(default_factory=ModelFiles)
    fps: int = 8


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
