"""The training drawings: one memory-mapped array, the same whatever the number of processes that drew it."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.tiny_shapes.drawing import draw
from rlr_peft.tiny_shapes import ATTRIBUTES, IMAGE_SIZE, Scene, scenes_of

_CHUNK = 500


def build_drawings(path: Path, count: int, seed: int, processes: int) -> None:
    """Draw ``count`` training scenes into a .npy file, (count, 64, 64, 3) uint8; drawing i shows ``scene_at(i)``."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(count, IMAGE_SIZE, IMAGE_SIZE, 3)).flush()
    tasks = [(unfinished, start, min(start + _CHUNK, count), seed) for start in range(0, count, _CHUNK)]
    if processes == 1:
        for task in tasks:
            _draw_chunk(task)
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in pool.imap_unordered(_draw_chunk, tasks):
                pass
    os.replace(unfinished, path)


def _draw_chunk(task: tuple[Path, int, int, int]) -> None:
    path, start, end, seed = task
    drawings = np.lib.format.open_memmap(path, mode="r+")
    for index in range(start, end):
        drawings[index] = draw(scene_at(index), np.random.default_rng([seed, index]))
    drawings.flush()


def scene_at(index: int) -> Scene:
    """The scene of a training drawing: all training scenes in turn, as often as needed."""
    training_scenes = scenes_of("train")
    return training_scenes[index % len(training_scenes)]


def labels_of(scene: Scene) -> list[int]:
    """Class number per attribute, in the order of ``ATTRIBUTES``."""
    return [values.index(getattr(scene, attribute)) for attribute, values in ATTRIBUTES.items()]


def label_table() -> torch.Tensor:
    """Class numbers of all training scenes, (scenes, 7) int64."""
    return torch.tensor([labels_of(scene) for scene in scenes_of("train")])


def as_images(drawings: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Drawings (B, 64, 64, 3) in 0..255 as images (B, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.array(drawings)).permute(0, 3, 1, 2).float() / 255


def fresh_drawings(count: int, seed: int, split: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
    """New drawings that no training has seen: images (count, 3, 64, 64) in [0, 1] and class numbers (count, 7)."""
    chosen = scenes_of("train" if split == "train" else "test")
    rng = np.random.default_rng(seed)
    picked = [chosen[index % len(chosen)] for index in range(count)]
    images = as_images(np.stack([draw(scene, rng) for scene in picked]))
    return images, torch.tensor([labels_of(scene) for scene in picked])
