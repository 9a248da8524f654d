"""Whether the Hub answers decides between its client's retries and its cache alone."""

import os
import socket

import pytest

from rlr_peft.build import work_offline_without_hub


@pytest.fixture
def _open_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlr_peft.build.reporting.getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.usefixtures("_open_environment")
def test_an_address_at_which_nothing_listens_is_offline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        work_offline_without_hub()
        assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the user's own word
    work_offline_without_hub()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    work_offline_without_hub()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert caplog.messages == ["127.0.0.1 does not answer: only files in the cache are used."]
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.mark.usefixtures("_open_environment")
def test_behind_a_proxy_the_client_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("rlr_peft.build.reporting.getproxies", lambda: {"http": "http://proxy:3128"})
    work_offline_without_hub()
    assert "HF_HUB_OFFLINE" not in os.environ
