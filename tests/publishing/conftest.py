"""A folder with what a run's record names."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder with the images that `FULL` names."""
    path = tmp_path / "my-adapter"
    for name in (
        "before_after.png",
        "reward_curve.png",
        *(f"images/{name}.png" for name in ("one", "two", "base_0", "adapter_0")),
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path / name)
    return path
