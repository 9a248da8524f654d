"""Settings for all tests: one thread (far faster for tiny models), no network, the same examples every time."""

import logging
import os
import sys
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    """Commands set what their process logs and how; here, many share one, in any order."""
    yield
    logging.getLogger("rlr_peft").setLevel(logging.NOTSET)
    logging.setLogRecordFactory(logging.LogRecord)
    logging.captureWarnings(False)
    sys.excepthook = sys.__excepthook__
