"""A user's code gets copies, leaves the global state as it was, and its errors are told apart from ours."""

import logging
import os
import random
import re
import signal
import warnings
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy
import pytest
import torch

from rlr_peft.errors import RewardError
from rlr_peft.prompt import Prompt
from rlr_peft.rewards import Reward, load_reward, measure_images, score_images
from tests.programs import completed

IMAGES = torch.linspace(0, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)
CODE = """
import logging, os, random, signal, sys, warnings
import numpy, torch

{top}

def mean(images, prompts):
    return images.mean((1, 2, 3))

def take_out(images, prompts, metadata):
    for entry in metadata:
        entry.pop("tag")
    return images.mean((1, 2, 3))

def take_from_list(images, prompts, *, metadata):
    for entry in metadata:
        entry["include"].pop()["class"]
    return images.mean((1, 2, 3))

def through_the_prompts(images, prompts):
    for prompt in prompts:
        for value in getattr(prompt, "metadata", {{}}).values():
            value.clear()
    prompts.clear()
    return images.mean((1, 2, 3))

def counts(images, prompts, metadata):
    for entry in metadata:
        for wanted in [*entry.get("include", []), *entry.get("exclude", [])]:
            wanted["class"]
    return images.mean((1, 2, 3))

class Buffer:
    differentiable = False

    def __init__(self):
        self.scores = torch.zeros(4)

    def __call__(self, images, prompts):
        self.scores += 1
        return self.scores[: len(images)], {{"info": self.scores[: len(images)]}}

def noisy(images, prompts):
    return images.mean((1, 2, 3)) + torch.rand(len(images))

noisy.differentiable = False

def changes(images, prompts):
    {inside}
    return images.mean((1, 2, 3))
"""
PROMPTS = [Prompt(text, metadata={"tag": text, "include": [{"class": text}]}) for text in ("a", "a", "b", "b")]


def reward_from(folder: Path, name: str, top: str = "", inside: str = "pass") -> Reward:
    (folder / "rewards.py").write_text(CODE.format(top=top, inside=inside))
    return load_reward(f"{folder / 'rewards.py'}:{name}")


@pytest.mark.parametrize("name", ["take_out", "take_from_list", "through_the_prompts", "counts"])
def test_what_a_reward_uses_up_is_its_own(tmp_path: Path, name: str) -> None:
    """Samples of a prompt share their metadata, and so do frames; rewards share all of them."""
    reward = reward_from(tmp_path, name)
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[2], PROMPTS[2]]
    videos = IMAGES[:, None].repeat(1, 2, 1, 1, 1)
    for _ in range(2):
        assert reward.settle(IMAGES, [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts])
        torch.testing.assert_close(score_images(reward, IMAGES, prompts), IMAGES.mean((1, 2, 3)))
        torch.testing.assert_close(score_images(reward, videos, prompts), IMAGES.mean((1, 2, 3)))
    assert [prompt.metadata for prompt in PROMPTS] == [
        {"tag": text, "include": [{"class": text}]} for text in ("a", "a", "b", "b")
    ]


def test_scores_in_a_buffer_that_is_filled_again(tmp_path: Path) -> None:
    reward = reward_from(tmp_path, "Buffer")
    first, second = (measure_images(reward, IMAGES, PROMPTS) for _ in range(2))
    assert first.scores.tolist() == first.info["info"].tolist() == [1.0] * 4
    assert second.scores.tolist() == second.info["info"].tolist() == [2.0] * 4


def global_state() -> dict[str, Any]:
    rlr = logging.getLogger("rlr_peft.training.trainer")
    return {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "precision": torch.get_float32_matmul_precision(),
        "benchmark": torch.backends.cudnn.benchmark,
        "anomaly": torch.is_anomaly_enabled(),
        "NumPy's errors": numpy.geterr(),
        "folder": os.getcwd(),
        "logging": (logging.root.level, list(logging.root.handlers), rlr.isEnabledFor(logging.WARNING), rlr.disabled),
        "signals": signal.getsignal(signal.SIGTERM),
    }


CHANGES = {
    "torch.set_grad_enabled(False)": "torch's grad mode",
    "torch.set_default_dtype(torch.float64)": "torch's default dtype",
    "torch.set_default_device('meta')": "torch's default device",
    "torch.set_num_threads(7)": "torch's number of threads",
    "torch.use_deterministic_algorithms(True, warn_only=True)": "torch's deterministic algorithms",
    "torch.set_float32_matmul_precision('high')": "torch's precision of matrix products",
    "torch.backends.cudnn.benchmark = True": "cuDNN's flags",
    "torch.autograd.set_detect_anomaly(True)": "torch's anomaly detection",
    "numpy.seterr(all='raise')": "NumPy's handling of errors",
    "os.chdir('/')": "the working folder",
    "logging.disable()": "the logging",
    "logging.basicConfig(level=60, force=True)": "the logging",
    "import logging.config as c; c.dictConfig({'version': 1})": "the logging",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)": "the handlers of signals",
}


@pytest.mark.parametrize("change", CHANGES)
def test_global_state_is_set_back(tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("rlr_peft.training.trainer")
    before = global_state()
    reward = reward_from(tmp_path, "changes", inside=change)
    assert global_state() == before and not caplog.messages
    for _ in range(2):
        reward(IMAGES, ["a"] * 4, [{}] * 4)
        assert global_state() == before
    assert caplog.messages == [f"Reward 'rewards.py:changes' changed {CHANGES[change]}, which was set back."]
    caplog.clear()
    reward = reward_from(tmp_path, "mean", top=change)
    assert global_state() == before
    assert [message.split(" changed ")[1] for message in caplog.messages] == [f"{CHANGES[change]}, which was set back."]
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score_images(reward, images, PROMPTS).sum(), images)
    assert torch.equal(gradient, torch.full_like(IMAGES, 1 / 192))


def test_it_is_set_back_after_errors_too(tmp_path: Path) -> None:
    before = global_state()
    failing = "torch.set_grad_enabled(False); torch.set_num_threads(7); 1 / 0"
    with pytest.raises(RewardError, match="raised ZeroDivisionError"):
        score_images(reward_from(tmp_path, "changes", inside=failing), IMAGES, PROMPTS)
    assert global_state() == before
    with pytest.raises(RewardError, match="failed while it was imported: ZeroDivisionError"):
        reward_from(tmp_path, "changes", top=failing)
    assert global_state() == before


SEEDING = "torch.manual_seed(0); random.seed(0); numpy.random.seed(0); torch.rand(3)"


def test_an_import_leaves_warnings_alone(tmp_path: Path) -> None:
    before = list(warnings.filters)
    reward_from(tmp_path, "mean", top="warnings.simplefilter('ignore')")
    assert list(warnings.filters) == before


def test_a_reward_that_seeds_leaves_all_generators_alone(tmp_path: Path) -> None:
    """Whatever they were seeded with before, even with the very same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        states = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        reward = reward_from(tmp_path, "changes", top=SEEDING, inside=SEEDING)
        score_images(reward, IMAGES, PROMPTS)
        assert torch.equal(torch.get_rng_state(), states[0])
    assert numpy.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]  # type: ignore[index]


def test_random_numbers_that_a_reward_draws_belong_to_what_it_scores(tmp_path: Path) -> None:
    """Others for other images or prompts; the same for the same, as in a resumed run."""
    reward = reward_from(tmp_path, "noisy")
    batches = [(IMAGES, PROMPTS), (IMAGES, ["x"] * 4), (IMAGES / 2, PROMPTS)]
    noises = [score_images(reward, *batch) - batch[0].mean((1, 2, 3)) for batch in batches]
    assert len({tuple(noise.tolist()) for noise in noises}) == 3
    assert torch.equal(score_images(reward, *batches[0]) - IMAGES.mean((1, 2, 3)), noises[0])


FORMS = """
import sys, torch

class FailsToBuild:
    def __init__(self):
        self.model = open("/nowhere/model.pt")

class ExitsToBuild:
    def __init__(self):
        sys.exit("no weights")

def generator(images, prompts):
    for image in images:
        yield image.mean()

async def asynchronous(images, prompts):
    return images.mean((1, 2, 3))

def exits(images, prompts):
    sys.exit(3)

def strings(images, prompts):
    return ["good"] * len(images)

def string(images, prompts):
    return "good"

def nothing(images, prompts):
    pass

def triple(images, prompts):
    return images.mean((1, 2, 3)), {}, {}

def too_many(images, prompts):
    return tuple(0.1 for _ in range(len(images) + 1))

def lazy(images, prompts):
    return (float(image.mean()) for image in images)

def deep(images, prompts):
    return inner(images)

def inner(images):
    return torch.nn.functional.conv2d(images, torch.zeros(1, 4, 3, 3))
"""
# What is printed after the one line of the error: the traceback into the user's own code, from its first line there.
SAID = {
    "FailsToBuild": ("in __init__", "cannot be instantiated without arguments: FileNotFoundError: .*nowhere/model.pt'"),
    "ExitsToBuild": ("in __init__", "asked for the end of the program, SystemExit: no weights; let it raise an error"),
    "exits": ("in exits", r"asked for the end of the program, SystemExit: 3 \(called with images"),
    "deep": ("in deep", "raised RuntimeError: Given groups=1, weight"),
    "generator": ("", "expected a function that returns scores, got one with `yield`"),
    "asynchronous": ("", "expected a function that returns scores, got an `async` one"),
    "strings": ("", "expected numbers, got 'good' at position 0; return one float per image"),
    "string": ("", "expected a tensor, an array or a list of 2 numbers, got str"),
    "nothing": ("", "expected a tensor, an array or a list of 2 numbers, got NoneType"),
    "triple": ("", r"expected numbers, got Tensor of shape \(2,\) at position 0; .* or \(scores, info\)"),
    "too_many": ("", r"expected scores of shape \(2,\), got \(3,\)"),
    "lazy": ("", "expected a tensor, an array or a list of 2 numbers, got generator"),
    "missing": ("", "has no 'missing'"),
}
ASK = """
import sys, torch
from rlr_peft.rewards.base import measure_images
from rlr_peft.rewards.registry import load_reward
from rlr_peft.build.reporting import reporting_errors
for spec in sys.argv[1:]:
    try:
        with reporting_errors():
            measure_images(load_reward(spec), torch.rand(2, 3, 8, 8, requires_grad=True), ["a cat", "a dog"])
    except SystemExit as left:
        print(f"left with {left.code}", file=sys.stderr)
"""


def test_an_error_is_one_line_before_the_users_own_frames(tmp_path: Path) -> None:
    (tmp_path / "forms.py").write_text(FORMS)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "failing.py").write_text("def helper():\n    1 / 0\nhelper()\n")
    (tmp_path / "arguments.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--nope'])\n")
    said = {f"{tmp_path}/forms.py:{name}": expected for name, expected in SAID.items()} | {
        "no_such_package.inner:f": ("", "module 'no_such_package.inner' was not found .*PYTHONPATH"),
        f"{tmp_path}/broken.py:f": (
            "",
            r"failed while it was imported: SyntaxError: invalid syntax \(broken\.py, line 1\)",
        ),
        f"{tmp_path}/failing.py:f": ("in helper", "failed while it was imported: ZeroDivisionError"),
        f"{tmp_path}/arguments.py:f": ("in parse_args", "asked for the end of the program, SystemExit: 2"),
        "tiny-shapes": ("", "cannot read the prompt of sample 0 \"a cat\": unknown word 'cat'"),
    }
    done = completed(["-c", dedent(ASK), *said])
    *parts, rest = done.stderr.split("left with 1\n")
    assert len(parts) == len(said) and not rest, done.stderr
    for (frame, message), printed in zip(said.values(), parts):
        before, error, after = re.split(r"^(error: reward .*)\n", printed, flags=re.MULTILINE)
        assert "Traceback" not in before  # argparse in a user's file prints its usage
        assert re.search(message, error), error
        assert ("Traceback" in printed) == bool(frame), printed
        assert frame in after and "rlr_peft/" not in printed and "importlib" not in printed, printed
