"""How long the Hub is waited for."""

from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from rlr_peft.publishing import HubError, hub_client, open_destination, patiently


def answers(headers: dict[str, str], status: int = 429) -> HfHubHTTPError:
    request = httpx2.Request("GET", "http://127.0.0.1/")
    return HfHubHTTPError("busy", response=httpx2.Response(status, headers=headers, request=request))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(hub_client.time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "nonsense"}, 0),
        ({"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 56),
        ({"ratelimit": '"api";r=0;t=300'}, 301),
        ({"ratelimit": '"api";r=3;t=55'}, 0),
        ({"ratelimit": '"api";r=0;t=55', "Retry-After": "2"}, 2),
    ],
)
def test_the_hub_says_when_to_come_again(waits: list[float], headers: dict[str, str], expected: float) -> None:
    outcomes: list[Any] = [answers(headers), "done"]

    def call() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    assert patiently(call) == "done" and waits == [expected]


@pytest.mark.parametrize("error", [answers({"Retry-After": "3600"}), answers({}, 403), answers({}, 404)])
def test_what_does_not_pass_is_not_waited_for(waits: list[float], error: HfHubHTTPError) -> None:
    def call() -> None:
        raise error

    with pytest.raises(HfHubHTTPError):
        patiently(call)
    assert waits == []


def test_five_tries_with_longer_and_longer_waits(waits: list[float]) -> None:
    def call() -> None:
        raise answers({}, 503)

    with pytest.raises(HfHubHTTPError):
        patiently(call)
    assert waits == [0, 2, 4, 8]


def test_a_branch_that_is_a_path_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(HubError, match=r"hub_revision: expected the name of a branch, got '../../x'; choose another"):
        open_destination("me/adapter", revision="../../x")
