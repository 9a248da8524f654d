"""Zeroth order (ZO): perturb the parameters on some steps and look only at the reward.

It estimates the gradient of the SMOOTHED objective: its bias is O(s^2) in the perturbation scale s, and its variance
grows with the number of parameters. It is the one term that is not a backward segment.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from rlr_peft.chain.adjoint import Booking, add_to_gradients
from rlr_peft.chain.steps import Chain, Trajectory
from rlr_peft.estimators.objective import Objective


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


@dataclass(frozen=True)
class Perturbation:
    """A term that moves the parameters on some steps.

    Attributes:
        steps: on which they are moved.
        how: the perturbation.
        baseline: of the one-point form, (B,).
        coefficient: factor of the estimate.
    """

    steps: frozenset[int]
    how: ZerothOrder
    baseline: torch.Tensor
    coefficient: float = 1.0


def perturb(
    chain: Chain, objective: Objective, trajectory: Trajectory, term: Perturbation, generator: torch.Generator
) -> Booking:
    """Adds the term's estimate, summed over the batch, to ``.grad`` of the chain's parameters."""
    total = [torch.zeros_like(parameter) for parameter in chain.parameters]
    for _ in range(term.how.samples):
        direction = [
            torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
            for parameter in chain.parameters
        ]
        slope = _slope(chain, objective, trajectory, term, direction, generator)
        for summed, part in zip(total, direction, strict=True):
            summed.add_(part, alpha=term.coefficient * slope / term.how.samples)
    norm = add_to_gradients(chain, total)
    return Booking("zeroth_order", tuple(sorted(term.steps)), term.coefficient, norm)


def _slope(
    chain: Chain,
    objective: Objective,
    trajectory: Trajectory,
    term: Perturbation,
    direction: list[torch.Tensor],
    generator: torch.Generator,
) -> float:
    """Derivative of the batch's summed reward along the direction."""
    scale, prompts = term.how.scale, trajectory.prompts

    def reward_at(signed_scale: float, noises: torch.Tensor) -> torch.Tensor:
        """Of rollouts whose parameters are moved by ``signed_scale * direction`` on the term's steps only."""
        latents = noises[chain.num_steps]
        for start, stop, is_moved in _runs(chain.num_steps, term.steps):
            with _moved(chain.parameters, direction, signed_scale if is_moved else 0.0):
                latents = chain.denoise(trajectory, start, latents, stop, noises)
        return objective.score(latents, prompts)

    if term.how.form == "two-point":
        noises = trajectory.noises
        return float((reward_at(scale, noises) - reward_at(-scale, noises)).sum()) / (2 * scale)
    seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
    return float((reward_at(scale, chain.draw_noises(seeds)) - term.baseline).sum()) / scale


def _runs(num_steps: int, steps: frozenset[int]) -> Iterator[tuple[int, int, bool]]:
    """``(start, stop, whether moved)`` of maximal runs of steps ``start, ..., stop + 1``, noise first."""
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
