"""What all rewards with a network share: frozen weights of a chosen dtype, on their device only while they are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rlr_peft.rewards.errors import RewardError
from rlr_peft.rewards.model_files import ModelFiles

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


class ModelReward(ABC):
    """A reward with a network; subclasses name it, load it and say how it scores.

    With `offload` the network is on its device from a call until its scores are differentiated, or only during the
    call if they cannot be: it is never there while a denoiser runs.
    """

    differentiable = True
    takes_video = False
    network: Any  # a module with a `config`

    def __init__(self, name: str, settings: ModelSettings, network: nn.Module) -> None:
        self.name = name
        self.settings = settings
        self.network = network.eval().requires_grad_(False)
        self._place(torch.device("cpu") if settings.offload else settings.device)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) float32 on the images' device, differentiable with respect to the images.

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
        scores = self.score(pixels, prompts).float()
        if settings.offload and not is_differentiated:
            self._place(torch.device("cpu"))
        return scores.to(images.device)

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores of (B, 3, H, W) float32 images on the network's device."""

    def _place(self, device: torch.device) -> None:
        try:
            self.network.to(device)
        except torch.OutOfMemoryError as error:
            size = sum(p.numel() * p.element_size() for p in self.network.parameters()) / 2**30
            raise RewardError(
                f"reward '{self.name}': its {size:.1f} GiB of weights do not fit into the memory of {device}; halve "
                "them with --reward_dtype bf16, or keep rewards on the CPU between uses with --offload_rewards"
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
