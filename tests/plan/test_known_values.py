"""Values beside meta tensors: what code sees of them is what it would see on a real device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlr_peft.byte_counters import LiveMemory
from rlr_peft.plan import KnownValues

MASK = [[1, 1, 0, 0], [1, 0, 1, 1]]


def lengths(device: str) -> Any:
    return torch.tensor(MASK).to(device).bool().sum(dim=1).tolist()


def without_padding(device: str) -> Any:
    mask = torch.tensor(MASK).to(device).bool()
    kept = torch.zeros(2, 4, 5, device=device)[mask]
    return [tuple(part.shape) for part in kept.split(mask.sum(1).tolist())]


def masked_beside_a_slice(device: str) -> Any:
    mask = torch.tensor(MASK[0], device=device) > 0
    return tuple(torch.zeros(4, 7, device=device)[mask, 2:].shape)


def compared_one_by_one(device: str) -> Any:
    return [bool(step >= 500) for step in torch.linspace(1000, 1, 3).to(device)]


def written_in_place(device: str) -> Any:
    values = torch.zeros(3, dtype=torch.long, device=device)
    values[1:] = 4
    values.add_(torch.arange(3, device=device))
    return values.tolist(), int(values.max()), len(values.nonzero())


def joined(device: str) -> Any:
    ones = torch.ones_like(torch.tensor([[1, 2]]).to(device))
    return torch.cat([ones, ones.new_zeros(1, 1)], dim=1).tolist()


def seen_on_the_host(device: str) -> Any:
    return torch.arange(3, device=device).cpu().numpy().tolist()


@pytest.mark.parametrize(
    "look",
    [lengths, without_padding, masked_beside_a_slice, compared_one_by_one, written_in_place, joined, seen_on_the_host],
)
def test_code_sees_on_meta_what_it_sees_on_the_cpu(look: Callable[[str], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        look("meta")
    with KnownValues():
        assert look("meta") == look("cpu")


def test_what_weights_make_stays_unknown() -> None:
    weights = torch.ones(4, device="meta")
    with KnownValues():
        values = torch.arange(4, device="meta")
        assert values.sum().item() == 6
        values.mul_(weights > 0)
        for unknown in (weights.sum(), values.sum(), values * weights):
            with pytest.raises(RuntimeError):
                unknown.max().item()
    with pytest.raises(RuntimeError):
        values.sum().item()


def test_large_tensors_and_gradients_are_left_alone() -> None:
    with KnownValues():
        with pytest.raises(RuntimeError):
            torch.zeros(100, 100, device="meta").max().item()
        latents = torch.zeros(3, device="meta").requires_grad_()
        doubled = latents * 2
        assert doubled.requires_grad and doubled.is_meta
        (gradient,) = torch.autograd.grad(doubled.sum(), latents)
        assert gradient.is_meta


def test_values_on_the_host_are_no_memory_of_the_plan() -> None:
    with KnownValues(), LiveMemory() as memory:
        mask = torch.ones(10, dtype=torch.float32).to("meta")
        doubled = mask * 2
        assert memory.live == mask.nbytes + doubled.nbytes == 80
