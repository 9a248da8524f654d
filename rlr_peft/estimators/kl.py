"""Divergence from the base: the KL of every step in closed form, as a number, as a penalty, and in adjoint matching.

Both steps are Gaussians of the same std, so ``KL_t = |mu_t - mu_ref,t|^2 / (2 sigma_t^2)``, and their sum over t is the
KL of the whole path. The penalty's gradient holds the visited states fixed, as Flow-GRPO's does; adjoint matching
(Domingo-Enrich et al. 2409.08861) follows the reward's gradient as the base carries it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch

from rlr_peft.chain.adjoint import IntoParameters, ReplayedStep, Segment
from rlr_peft.chain.steps import Chain, Trajectory, noisy_steps
from rlr_peft.config.methods import AdjointMatchingArguments
from rlr_peft.errors import UserError
from rlr_peft.estimators.base import FIRST_ORDER, Coverage, CoverageError, Estimator, RunShape
from rlr_peft.estimators.half_order import HalfOrder, draw, draw_probabilities, expected_draws
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.reports import counted


class NoDivergenceError(UserError, ValueError):
    """A chain without noise, whose paths have no density."""


@dataclass(frozen=True)
class KLPenalty:
    """How the divergence is measured and penalised.

    Attributes:
        beta: the objective is ``R - beta KL`` per sample; 0 only measures.
        steps: number of steps drawn, with weight 1 / q, or "all".
    """

    beta: float
    steps: int | Literal["all"]


@dataclass(frozen=True)
class ReferenceStep:
    """The base's mean of a step that the samples took.

    Attributes:
        t: the step.
        mean: the base's, from the same x_t, (B, ...).
        weight: of the step in sums over all steps, 1 / q if it was drawn.
    """

    t: int
    mean: torch.Tensor
    weight: float = 1.0


@torch.no_grad()
def reference_mean(chain: Chain, trajectory: Trajectory, t: int) -> torch.Tensor:
    """The mean of step t, (B, ...), that the base gives from the same x_t."""
    return chain.replay_reference(trajectory, t).mean


def reference_steps(
    chain: Chain, trajectory: Trajectory, steps: int | Literal["all"], generator: torch.Generator
) -> list[ReferenceStep]:
    """Asks the base for its means of all steps with noise, or of some that are drawn evenly.

    Args:
        chain: with a reference.
        steps: how many are drawn, or "all".
        generator: of the draws, on the CPU.

    Raises:
        NoDivergenceError: no step of the chain has noise.
    """
    blocks = [range(t, t + 1) for t in noisy_steps(chain)]
    if not blocks:
        raise NoDivergenceError(
            f"Expected noise in the chain, without which the divergence from the base is not defined, got none in its "
            f"{chain.num_steps} step(s). Raise eta or num_inference_steps, or drop the divergence."
        )
    chosen, weights = list(range(len(blocks))), [1.0] * len(blocks)
    if steps != "all":
        probabilities = draw_probabilities(blocks, HalfOrder(1, steps), {})
        weights = [1 / chance for chance in expected_draws(probabilities, steps).tolist()]
        chosen = draw(probabilities, steps, generator)
    drawn = [(blocks[i][0], weights[i]) for i in chosen]
    return [ReferenceStep(t, reference_mean(chain, trajectory, t), weight) for t, weight in drawn]


def path_kl(trajectory: Trajectory, references: Sequence[ReferenceStep]) -> torch.Tensor:
    """KL of the sampled paths from the base's, of the weights that sampled them, (B,) in nats."""
    divergence = torch.zeros(trajectory.batch_size, device=trajectory.latents.device, dtype=trajectory.latents.dtype)
    for step in references:
        divergence += step.weight * step_kl(trajectory.mean(step.t), step.mean, trajectory.std(step.t))
    return divergence


def kl_segments(trajectory: Trajectory, references: Sequence[ReferenceStep], beta: float) -> Iterator[Segment]:
    """The terms of ``- beta KL``, summed over the batch, by the present weights."""
    for step in references:

        def pull(
            t: int, mean: torch.Tensor, _: torch.Tensor | None, reference: torch.Tensor = step.mean
        ) -> tuple[torch.Tensor, Mapping[str, float]]:
            return -beta * (mean - reference) / trajectory.std(t) ** 2, {}

        yield Segment("kl", (step.t,), None, step.weight, into_parameters=pull)


def step_kl(mean: torch.Tensor, of_reference: torch.Tensor, std: float) -> torch.Tensor:
    """KL of two Gaussian steps of the same std, summed over latent dimensions, (B,)."""
    return (mean - of_reference).square().flatten(1).sum(1) / (2 * std**2)


def _through_base(
    chain: Chain, trajectory: Trajectory, t: int, cotangent: torch.Tensor, travels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's mean of step t and, if it travels on, the cotangent at the step's input; no tape is left behind."""
    if not travels:
        return reference_mean(chain, trajectory, t), cotangent
    step = ReplayedStep(chain, trajectory, t, of_reference=True)
    return step.output.detach(), step.into_latents(cotangent)


class AdjointMatchingEstimator(Estimator):
    """Maximises ``scale R(x_0) - KL(path from the base)`` without differentiating the chain by the adapter.

    The cotangent c_t of the reward is swept back through the BASE, the lean adjoint; at a drawn step the mean is pulled
    by ``scale c_{t-1} - (mu_t - mu_base,t) / std_t^2``, which vanishes at the optimum. The sum is divided by the scale,
    so that it is a gradient of the reward in the reward's own units.
    """

    uses_reward_gradient = True

    def __init__(self, arguments: AdjointMatchingArguments) -> None:
        self.first_order_steps, self.scale = arguments.fo_steps, arguments.reward_scale
        self.coefficient = arguments.fo_coefficient

    @classmethod
    def from_arguments(cls, arguments: AdjointMatchingArguments, shape: RunShape) -> Self:
        return cls(arguments)

    def compares_images(self, chain: Chain, has_gradient: bool) -> bool:
        """Not: the base's reward gradient is all that it asks of an image."""
        return False

    def describe(self, has_gradient: bool | None = None) -> str:
        return (
            f"the base's reward gradient and the pull to the base on "
            f"{counted(self.first_order_steps, 'drawn step')}, "
            f"for {self.scale:g} times the reward minus the divergence"
        )

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """No step of the reward's own gradient is covered.

        Raises:
            CoverageError: the reward has no gradient, or no step has noise.
        """
        if not has_gradient:
            raise CoverageError(
                "Expected a differentiable reward for adjoint-matching, got one without gradient. Use --estimator rlr."
            )
        if not noisy_steps(chain):
            raise CoverageError("Expected noise in the chain for adjoint-matching, got none. Raise eta.")
        departure = "the reward's gradient is carried by the base model, and a pull to the base is added"
        return Coverage(torch.zeros(chain.num_steps, dtype=torch.float64), {}, departures=(departure,))

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterator[Segment]:
        assert rollout.reward_gradient is not None  # as the coverage has checked
        trajectory, cotangent = rollout.trajectory, rollout.reward_gradient
        noisy = noisy_steps(chain)
        count = min(self.first_order_steps, len(noisy))
        drawn = {noisy[i] for i in torch.randperm(len(noisy), generator=generator)[:count].tolist()}
        weight, last = self.coefficient * len(noisy) / count, max(drawn)
        for t in range(1, last + 1):
            mean, carried = _through_base(chain, trajectory, t, cotangent, travels=t < last)
            if t in drawn:
                pull = self._pull(cotangent, mean, chain.std(t))
                yield Segment(FIRST_ORDER, (t,), None, weight, into_parameters=pull)
            cotangent = carried

    def _pull(self, cotangent: torch.Tensor, base_mean: torch.Tensor, std: float) -> IntoParameters:
        def pull(
            t: int, mean: torch.Tensor, travelling: torch.Tensor | None
        ) -> tuple[torch.Tensor, Mapping[str, float]]:
            return cotangent - (mean - base_mean) / (self.scale * std**2), {}

        return pull
