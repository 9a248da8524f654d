"""Settings for all tests: one thread (far faster for tiny models), no network, the same examples every time."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before any Hugging Face library is imported: they read these at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# For the processes that tests start, many at a time: threads that wait for each other would fill every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On AMD processors MKL's products depend in the last digit on where their operands lie; tests compare bit for bit.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")

# What takes longest, longest first: begun first, so that no worker is left alone with one of them at the end.
LONGEST = (
    "training/test_train_script.py",
    "plan/test_host_memory.py",
    "training/test_methods.py",
    "families/test_training.py",
    "publishing/test_package_data.py",
    "training/test_several_rewards.py",
    "families/test_plan.py",
    "hub/test_push.py",
    "hub/test_training.py",
    "compare/test_command.py",
    "training/test_notebook.py",
    "build/test_interruption.py",
    "diagnose/test_report.py",
    "tiny_shapes/test_build.py",
    "training/test_learning_signal.py",
    "build/test_single_file.py",
    "build/test_processes.py",
    "testing/test_guided_mixture_chain.py",
    "training/test_prompt_sources.py",
    "plan/test_real_size.py",
    "training/test_resuming.py",
    "hub/test_secrets.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    """Commands set what their process logs and how; here, many share one, in any order."""
    yield
    logging.getLogger("rlr_peft").setLevel(logging.NOTSET)
    logging.setLogRecordFactory(logging.LogRecord)
    logging.captureWarnings(False)
    sys.excepthook = sys.__excepthook__
