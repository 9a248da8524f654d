"""Every family's pipeline, saved once for all tests."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from rlr_peft.chain import families
from tests.families.table import CASES


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    """Loading bars of fifty tiny models hide what matters."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    yield
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def small_pictures() -> Iterator[None]:
    """Qwen-Image-Edit would scale the picture that it draws from to a million pixels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            own = module.calculate_dimensions
            patch.setattr(module, "calculate_dimensions", lambda area, ratio, own=own: own(32 * 32, ratio))
        rows = [replace(row, image_area=32 * 32) if row.image_area else row for row in families.FAMILIES]
        patch.setattr(families, "FAMILIES", tuple(rows))
        yield


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """From a family's name to the folder of its pipeline, as `save_pretrained` wrote it."""
    folders: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in folders:
            if name == "wan-i2v":
                pytest.importorskip("ftfy", reason="diffusers' pipeline of Wan from pictures needs ftfy")
            path = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                pipeline = CASES[name].build()
            pipeline.save_pretrained(path)
            folders[name] = str(path)
        return folders[name]

    return folder
