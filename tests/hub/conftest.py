"""One loopback Hub for the tests of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.processes import LoopbackHub
from tests.training.conftest import workplace  # noqa: F401 (a fixture)


@pytest.fixture(scope="session")
def running_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.stop()


@pytest.fixture
def hub(running_hub: LoopbackHub) -> LoopbackHub:
    """The Hub without faults, and with an empty list of requests."""
    running_hub.fail()
    return running_hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A fresh HF_HOME."""
    return tmp_path / "home"
