"""The cost that the peers' trainers are booked with, on a denoiser whose passes are known."""

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import Passes


class Denoiser(torch.nn.Module):
    """Two layers, so that a checkpoint has something to compute again; returns a tuple, as diffusers' models may."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layers(latents),)


def test_checkpointed_steps_are_booked_with_their_second_forward_and_detached_ones_without_backward() -> None:
    denoiser = Denoiser()
    passes = Passes(denoiser)
    latents = torch.randn(3, 4)
    for step in range(4):
        output = checkpoint(denoiser, torch.cat([latents, latents]), use_reentrant=False)[0]
        if step in (0, 2):
            output = output.detach()
        latents = latents + sum(output.chunk(2))
    assert (passes.forwards, passes.backwards) == (3 * 4, 0)
    latents.sum().backward()
    assert (passes.forwards, passes.backwards) == (3 * (4 + 2), 3 * 2)
    assert passes.cost == 3 * (4 + 2 + 2 * 2)
