"""Zeroth order (ZO): perturb the parameters on some steps and look only at the reward.

It estimates the gradient of the SMOOTHED objective: its bias is O(s^2) in the perturbation scale s, and its variance
grows with the number of parameters. It is the one term that is not a backward segment.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from rlr_peft.chain.adjoint import add_to_gradients
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.objective import Objective
from rlr_peft.estimators.rollout import Rollout


@dataclass(frozen=True)
class ZerothOrder:
    """How parameters are perturbed.

    Attributes:
        form: "two-point" takes ``u [R(theta + s u) - R(theta - s u)] / (2 s)`` with the rollout's own noises,
            "one-point" takes ``u [R(theta + s u) - baseline] / s`` with fresh noises.
        scale: s, standard deviation of the perturbation of every parameter.
        samples: number of perturbations to average.
    """

    form: Literal["one-point", "two-point"]
    scale: float
    samples: int = 1


def accumulate_zeroth_order(
    chain: Chain,
    objective: Objective,
    rollout: Rollout,
    steps: Sequence[int],
    zeroth_order: ZerothOrder,
    generator: torch.Generator,
    coefficient: float = 1.0,
) -> float:
    """Adds ``coefficient`` times the estimate for the given steps, summed over the batch, to ``.grad``.

    Returns:
        The Euclidean norm of what was added.
    """
    total = [torch.zeros_like(parameter) for parameter in chain.parameters]
    for _ in range(zeroth_order.samples):
        perturbation = [
            torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
            for parameter in chain.parameters
        ]
        slope = _slope(chain, objective, rollout, frozenset(steps), perturbation, zeroth_order, generator)
        for summed, direction in zip(total, perturbation, strict=True):
            summed.add_(direction, alpha=coefficient * slope / zeroth_order.samples)
    return add_to_gradients(chain, total)


def _slope(
    chain: Chain,
    objective: Objective,
    rollout: Rollout,
    steps: frozenset[int],
    perturbation: list[torch.Tensor],
    zeroth_order: ZerothOrder,
    generator: torch.Generator,
) -> float:
    """Derivative of the batch's summed reward along the perturbation."""
    scale, prompts = zeroth_order.scale, rollout.trajectory.prompts

    def reward_at(signed_scale: float, noises: torch.Tensor) -> torch.Tensor:
        latents = _perturbed_rollout(chain, rollout, steps, perturbation, signed_scale, noises)
        return objective.score(latents, prompts)

    if zeroth_order.form == "two-point":
        noises = rollout.trajectory.noises
        return float((reward_at(scale, noises) - reward_at(-scale, noises)).sum()) / (2 * scale)
    seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
    baseline = rollout.rewards - rollout.advantages
    return float((reward_at(scale, chain.draw_noises(seeds)) - baseline).sum()) / scale


def _perturbed_rollout(
    chain: Chain,
    rollout: Rollout,
    steps: frozenset[int],
    perturbation: list[torch.Tensor],
    scale: float,
    noises: torch.Tensor,
) -> torch.Tensor:
    """x_0 of a rollout whose parameters are moved by ``scale * perturbation`` on the given steps only."""
    latents = noises[chain.num_steps]
    for start, stop, perturbed in _runs(chain.num_steps, steps):
        with _moved(chain.parameters, perturbation, scale if perturbed else 0.0):
            latents = chain.rollout(rollout.trajectory, start, latents, stop, noises)
    return latents


def _runs(num_steps: int, steps: frozenset[int]) -> Iterator[tuple[int, int, bool]]:
    """``(start, stop, whether perturbed)`` of maximal runs of steps ``start, ..., stop + 1``, noise first."""
    start = num_steps
    for t in range(num_steps, 0, -1):
        if t == 1 or ((t - 1) in steps) != (t in steps):
            yield start, t - 1, t in steps
            start = t - 1


@contextmanager
def _moved(parameters: Sequence[torch.nn.Parameter], direction: list[torch.Tensor], scale: float) -> Iterator[None]:
    if scale == 0:
        yield
        return
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, delta in zip(parameters, direction, strict=True):
                parameter.add_(delta, alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
