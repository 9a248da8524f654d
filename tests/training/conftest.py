"""The folder that the tests of whole runs work from."""

from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from tests.pipelines import tiny_stable_diffusion

REWARDS = """
import time

def redness(images, prompts):
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))

def lack_of_red(images, prompts):
    return -redness(images, prompts)

def mistaken(images, prompts):
    return 1 / 0

def slow_redness(images, prompts):
    time.sleep(0.15)
    return redness(images, prompts)

def blind_redness(images, prompts):
    return redness(images, prompts).detach().numpy()

def slow_blind_redness(images, prompts):
    time.sleep(0.15)
    return blind_redness(images, prompts)

def small_latents(latents, prompts):
    return -latents.square().flatten(1).mean(1)

small_latents.takes_latents = True

class BreaksLater:
    differentiable = True

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        scores = redness(images, prompts)
        return scores / 0 if self.calls > 3 else scores
"""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base pipeline, prompts and rewards."""
    folder = tmp_path_factory.mktemp("workplace")
    pipeline = tiny_stable_diffusion("v_prediction", timestep_spacing="trailing")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)  # sigma_1 = 0
    pipeline.save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("red ball\nblue box\ngreen tree\nsky\nsea\n")
    (folder / "unseen.txt").write_text("a cat\na dog\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder
