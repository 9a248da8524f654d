"""When a run is stopped, when it is not, and what it goes back to."""

from pathlib import Path

import pytest
import torch

from rlr_peft.training import KL_WINDOW, EarlyStopping, Stop


def watched(stopping: EarlyStopping, heldout: list[float], first_step: int = 1) -> Stop | None:
    """The first decision to stop; the weights are the number of the update that they come from."""
    for step, value in enumerate(heldout, start=first_step):
        stop = stopping.check(step, value, None, [torch.tensor([float(step)])])
        if stop is not None:
            return stop
    return None


def rising_then_falling() -> list[float]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.cat([torch.linspace(0, 1, 20), torch.linspace(1, 0, 20)])
    return (truth + 0.05 * torch.randn(40, generator=generator)).tolist()


def test_a_decline_brings_back_the_weights_of_the_best_window() -> None:
    stop = watched(EarlyStopping(5, None), rising_then_falling())
    assert stop is not None and stop.weights is not None
    assert stop.weights[0].tolist() == [25.0]
    assert "Stopped at update 35 because the held-out reward fell from 0.8981 (updates up to 25)" in stop.sentence
    assert "the weights are those of update 25" in stop.sentence


def test_weights_are_kept_as_they_were() -> None:
    stopping, weight = EarlyStopping(2, None), torch.zeros(1)
    for step, value in enumerate([1.0, 1.1, 0.0, 0.1], start=1):
        weight += 1
        stop = stopping.check(step, value, None, [weight])
    assert stop is not None and stop.weights is not None and stop.weights[0].tolist() == [2.0]


@pytest.mark.parametrize("window", [5, 20])
def test_noise_alone_stops_about_one_run_in_a_hundred_and_a_fall_stops_them_all(window: int) -> None:
    """Of 400 runs of 50 windows 4 are to stop at 1 %, with a standard deviation of 2; 12 are not to be exceeded."""
    runs = torch.randn(400, 50, window, generator=torch.Generator().manual_seed(0))
    assert sum(watched(EarlyStopping(window, None), run.flatten().tolist()) is not None for run in runs) <= 12
    # eight standard errors of the difference of two windows
    runs[:, 2:] -= 8 * (2 / window) ** 0.5
    assert sum(watched(EarlyStopping(window, None), run[:6].flatten().tolist()) is not None for run in runs) > 380


def test_a_plateau_after_the_best_window_is_no_decline() -> None:
    generator = torch.Generator().manual_seed(1)
    values = [0.0] * 5 + (1 + 0.1 * torch.randn(200, generator=generator)).tolist()
    assert watched(EarlyStopping(5, None), values) is None


def test_the_divergence_stops_where_its_mean_over_ten_updates_passes_the_limit() -> None:
    stopping = EarlyStopping(None, kl_limit=2.0)
    values = [100.0] + [0.0] * (KL_WINDOW - 2) + [1.0, 1.0, 3.0, 18.0]
    decisions = [stopping.check(step, None, kl, [torch.zeros(1)]) for step, kl in enumerate(values, start=1)]
    # the first full window contains the outlier: mean 10.1
    assert [stop is not None for stop in decisions] == [False] * (KL_WINDOW - 1) + [True, False, False, True]
    assert decisions[-1] is not None and decisions[-1].weights is None, "the present weights are kept"
    assert "the divergence from the base, 2.3 nats, passed the limit of 2." in decisions[-1].sentence
    assert EarlyStopping(None, None).check(1, -1e9, 1e9, []) is None
    assert EarlyStopping(5, 2.0).check(1, None, None, []) is None


def test_the_state_survives_a_round_trip_in_the_middle_of_a_window(tmp_path: Path) -> None:
    values = rising_then_falling()
    whole = watched(EarlyStopping(5, None), values)
    stopping = EarlyStopping(5, None)
    assert watched(stopping, values[:23]) is None
    assert stopping.check(23, None, 1.5, []) is None
    torch.save(stopping.state_dict(), tmp_path / "state.pt")
    restored = EarlyStopping(5, None)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert str(restored.state_dict()) == str(stopping.state_dict())
    resumed = watched(restored, values[23:], first_step=24)
    assert whole is not None and resumed is not None
    assert resumed.sentence == whole.sentence
    assert resumed.weights is not None and whole.weights is not None
    assert torch.equal(resumed.weights[0], whole.weights[0])
