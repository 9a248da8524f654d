"""Drawn images and measured numbers on disk, so that a comparison that was stopped goes on where it stood.

Everything is kept under a key of all that would change it, and is complete or absent: files are written aside and
renamed (`rlr_peft.files`), and what cannot be read back whole counts as absent. Images are PNG files that anyone can
look at. They hold 8 bits a channel, so a fresh image is rounded likewise before anything looks at it: scores do not
depend on whether the image was drawn now or earlier.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub import try_to_load_from_cache
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlr_peft.compare.distances import MeasureDivergence
from rlr_peft.compare.evaluation import FeatureExtractor, Render
from rlr_peft.config.reward import model_in
from rlr_peft.files import replacing_file, sha256_of
from rlr_peft.prompt import Prompt
from rlr_peft.rewards.base import Reward, Scored, measure_images
from rlr_peft.rewards.preprocessing import to_8_bit
from rlr_peft.rewards.remote import RemoteReward

KEY_LENGTH = 16  # hexadecimal digits


def digest(*parts: Any) -> str:
    """A short key of plain values: equal for equal values, in every process and on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=_in_words)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _in_words(value: Any) -> str:
    return pixels_digest(value[None]) if torch.is_tensor(value) else str(value)


def model_identity(name: str | None, revision: str | None = None, cache_dir: str | None = None) -> Any:
    """Of a loaded model: the commit of a Hub repository; of a folder its files' names, sizes and times of change.

    Weights of many gigabytes are not read for this. A copied folder counts as another one, which costs drawing again
    and never a wrong image.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return [[file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    for file in ("model_index.json", "config.json"):
        found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):
            return [name, Path(found).parent.name]  # the snapshot's folder is named after the commit
    return [name, revision]


def reward_identity(spec: str) -> Any:
    """Of a reward: its spec, and the files of a judge or the source of a user's callable. A server is asked for its
    version besides.
    """
    model = model_in(spec)
    if model is not None:
        return [spec, model_identity(model)]
    source, _, _ = spec.rpartition(":")
    if not source or spec.startswith(("http://", "https://")):
        return [spec]
    if source.endswith(".py"):
        return [spec, sha256_of(Path(source))]
    try:
        found = importlib.util.find_spec(source)
    except (ImportError, ValueError):
        return [spec]
    origin = None if found is None else found.origin
    return [spec, sha256_of(Path(origin)) if origin is not None and Path(origin).is_file() else None]


logger = logging.getLogger(__name__)

_DIGEST, _FRAMES, _VERSION = "sha256 of the pixels", "frames", "version"


class KeptImages:
    """A `Render` that draws a batch once and finds it again ever after.

    Args:
        folder: of this model's images; its name must hold the digest of all that would change them.
    """

    def __init__(self, folder: Path, draw: Render) -> None:
        self._folder = folder
        self._draw = draw

    def path(self, prompt: Prompt, seed: int) -> Path:
        """The file of an image, or of a video's first frame."""
        return self._folder / f"{seed:010d}-{digest(_drawn(prompt), seed)[:8]}.png"

    def __call__(self, prompts: list[Prompt], seeds: list[int]) -> Tensor:
        """(B, 3, H, W), or (B, F, 3, H, W), in [0, 1], rounded to 8 bits.

        A batch of which anything is missing is drawn whole again: rounding may depend on what is drawn together.
        """
        paths = [self.path(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        found = [_read(path) for path in paths]
        whole = [image for image in found if image is not None]
        if len(whole) == len(found) and len({image.shape for image in whole}) == 1:
            return torch.stack(whole).float() / 255
        images = to_8_bit(self._draw(prompts, seeds))
        for path, prompt, seed, image in zip(paths, prompts, seeds, images, strict=True):
            _write(path, prompt, seed, image)
        return torch.from_numpy(images).movedim(-1, -3).float() / 255


class KeptReward(Reward):
    """A `Reward` that scores images once and finds the scores again, by the images' pixels and the prompts.

    What a server scored is kept with the version that it stated. It is found again under that version only, and with a
    warning if the server does not say now which version it is: it may have changed since.

    Args:
        identity: of the reward: all that would change its scores.
    """

    def __init__(self, reward: Reward, folder: Path, identity: Any) -> None:
        self._reward = reward
        self._folder = folder
        self._identity = identity
        self.name = reward.name
        self.takes_video, self.takes_images = reward.takes_video, reward.takes_images
        self._said: set[str] = set()

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scored:
        """The reward's scores and info.

        Raises:
            RewardError: of the reward.
        """
        path = (
            self._folder / f"{digest('reward', self._identity, prompts, metadata, pixels_digest(images))}.safetensors"
        )
        found = _found(path)
        if found is not None and self._is_current(found[1]):
            kept = found[0]
        else:
            scored = measure_images(self._reward, images, prompts, metadata)
            kept = {"scores": scored.scores.cpu(), **{f"info/{name}": value for name, value in scored.logged.items()}}
            _keep(path, kept, self._reward.version if isinstance(self._reward, RemoteReward) else None)
        info = {name.removeprefix("info/"): value for name, value in kept.items() if name.startswith("info/")}
        return Scored(kept["scores"], info=info)

    def _is_current(self, version: str | None) -> bool:
        """Whether scores of this version may be taken; it says once if they may not, or if that cannot be known."""
        if not isinstance(self._reward, RemoteReward):
            return True
        if self._version is None:
            self._say(
                f"Reward server '{self.name}' does not say which version it is: its scores in {self._folder} are taken "
                "as they are. If it has changed since, delete that folder."
            )
        elif self._version != version:
            self._say(
                f"Reward server '{self.name}' is of version {self._version} now: its scores in {self._folder} are of "
                f"version {version or 'unknown'}, and are measured again."
            )
        return self._version in (None, version)

    @cached_property
    def _version(self) -> str | None:
        return self._reward.ask_version() if isinstance(self._reward, RemoteReward) else None

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            logger.warning(sentence)
        self._said.add(sentence)


class KeptFeatures:
    """A `FeatureExtractor` that looks at images once.

    Args:
        identity: all that would change the features.
    """

    def __init__(self, extractor: FeatureExtractor, folder: Path, identity: Any) -> None:
        self._extractor = extractor
        self._folder = folder
        self._identity = identity
        self.name = extractor.name

    def __call__(self, images: Tensor) -> Tensor:
        """(B, D) float32 on the CPU."""
        key = digest("features", self._identity, pixels_digest(images))
        return kept_tensors(self._folder, key, lambda: {"features": self._extractor(images)})["features"]


def kept_divergence(measure: MeasureDivergence, folder: Path, identity: Any) -> MeasureDivergence:
    """A measurement of the divergence that is made once for every batch."""

    def measure_once(prompts: list[Prompt], seeds: list[int]) -> Tensor:
        key = digest("divergence", identity, [_drawn(prompt) for prompt in prompts], seeds)
        return kept_tensors(folder, key, lambda: {"divergence": measure(prompts, seeds)})["divergence"]

    return measure_once


def kept_tensors(folder: Path, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from `folder/key.safetensors`; they are computed and written there if they are not whole."""
    path = folder / f"{key}.safetensors"
    found = _found(path)
    return found[0] if found is not None else _keep(path, compute())


def _found(path: Path) -> tuple[dict[str, Tensor], str | None] | None:
    """The tensors of a file and the version that they are of; None if it is not there, or damaged since."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get(_VERSION)  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _keep(path: Path, tensors: Mapping[str, Tensor], version: str | None = None) -> dict[str, Tensor]:
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing_file(path) as aside:
        save_file(whole, aside, None if version is None else {_VERSION: version})
    return whole


def pixels_digest(images: Tensor) -> str:
    """SHA-256 of images that are rounded to 8 bits, and of their shape."""
    return _digest_of(to_8_bit(images))


def _digest_of(pixels: NDArray[numpy.uint8]) -> str:
    channels_first = numpy.moveaxis(pixels, -1, -3)
    return hashlib.sha256(str(channels_first.shape).encode() + channels_first.tobytes()).hexdigest()


def _drawn(prompt: Prompt) -> list[Any]:
    """All of a prompt that its image depends on."""
    image = prompt.image and hashlib.sha256(prompt.image.data or Path(prompt.image.path).read_bytes()).hexdigest()
    return [prompt.text, prompt.negative_prompt, prompt.stages, *([image] if image else [])]


def _write(path: Path, prompt: Prompt, seed: int, image: NDArray[numpy.uint8]) -> None:
    """One PNG of (H, W, 3), or of a video one a frame; the first comes last, since it tells how many there are."""
    frames = list(image) if image.ndim == 4 else [image]
    for index in reversed(range(len(frames))):
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt("prompt", prompt.text)
        notes.add_text("seed", str(seed))
        notes.add_text(_FRAMES, str(len(frames) if image.ndim == 4 else 0))
        notes.add_text(_DIGEST, _digest_of(frames[index]))
        with replacing_file(_frame_path(path, index)) as aside:
            Image.fromarray(frames[index]).save(aside, format="PNG", pnginfo=notes)


def _read(path: Path) -> Tensor | None:
    """The uint8 image (3, H, W) or video (F, 3, H, W); None if anything of it is missing or damaged."""
    first = _read_frame(path)
    if first is None:
        return None
    image, num_frames = first
    if num_frames == 0:
        return image
    frames = [first, *(_read_frame(_frame_path(path, index)) for index in range(1, num_frames))]
    whole = [frame[0] for frame in frames if frame is not None]
    return torch.stack(whole) if len(whole) == num_frames else None


def _read_frame(path: Path) -> tuple[Tensor, int] | None:
    try:
        with Image.open(path) as picture:
            pixels = numpy.array(picture.convert("RGB"))
            notes = {str(name): value for name, value in picture.info.items()}
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError):
        return None
    if notes.get(_DIGEST) != _digest_of(pixels):
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1), int(notes[_FRAMES])


def _frame_path(path: Path, index: int) -> Path:
    return path if index == 0 else path.with_name(f"{path.stem}-{index:03d}.png")


def image_paths(kept: KeptImages, prompts: Sequence[Prompt], seeds: Sequence[int], root: Path) -> list[str]:
    """The images' files, relative to `root`."""
    return [kept.path(prompt, seed).relative_to(root).as_posix() for prompt, seed in zip(prompts, seeds, strict=True)]
