import io
import random
from typing import Any

import numpy
import pytest
import torch

from rlr_peft.training import RandomStatesError, capture_random_states, restore_random_states


def through_a_file(states: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save([states], buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)[0]
    return loaded


def draw(device: str) -> list[Any]:
    return [
        [random.random(), random.gauss(0, 1), random.getrandbits(70)],
        [*numpy.random.random(3).tolist(), numpy.random.normal()],
        torch.randn(3).tolist(),
        torch.randn(3, device=device).tolist(),
    ]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_all_generators_go_on_where_they_were(device: str) -> None:
    random.seed(3)
    numpy.random.seed(3)
    random.gauss(0, 1)  # leaves a second Gaussian in store, which is part of the state
    numpy.random.normal()
    states = through_a_file(capture_random_states(device))
    expected = draw(device)
    for seed in (0, 1):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        assert draw(device) != expected
        restore_random_states(states, device)
        assert draw(device) == expected


def test_states_without_a_gpu_are_refused_on_one() -> None:
    with pytest.raises(RandomStatesError, match="no CUDA generator, but this process runs on cuda:0"):
        restore_random_states(capture_random_states("cpu"), "cuda:0")
