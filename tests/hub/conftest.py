"""One loopback Hub for the tests of a file."""

import shutil
from collections.abc import Iterator

import pytest

from tests.hub.processes import LoopbackHub
from tests.training.conftest import workplace  # noqa: F401 (a fixture)


@pytest.fixture(scope="session")
def running_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home"))
    yield hub
    hub.stop()


@pytest.fixture
def hub(running_hub: LoopbackHub) -> LoopbackHub:
    """The Hub without faults, with an empty list of requests, and with nothing fetched."""
    running_hub.fail()
    shutil.rmtree(running_hub.home, ignore_errors=True)
    return running_hub
