"""Adjoint matching: steps follow the reward's gradient as the base carries it (Domingo-Enrich et al. 2409.08861)."""

from collections.abc import Iterator, Mapping
from typing import Self

import torch

from rlr_peft.chain.adjoint import IntoParameters, ReplayedStep, Segment
from rlr_peft.chain.interface import Chain
from rlr_peft.config.methods import AdjointMatchingArguments
from rlr_peft.estimators.base import FIRST_ORDER, Coverage, CoverageError, Estimator, RunShape
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.reports import counted


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
        if not _noisy(chain):
            raise CoverageError("Expected noise in the chain for adjoint-matching, got none. Raise eta.")
        departure = "the reward's gradient is carried by the base model, and a pull to the base is added"
        return Coverage(torch.zeros(chain.num_steps, dtype=torch.float64), {}, departures=(departure,))

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterator[Segment]:
        assert rollout.reward_gradient is not None  # as the coverage has checked
        trajectory, cotangent = rollout.trajectory, rollout.reward_gradient
        noisy = _noisy(chain)
        count = min(self.first_order_steps, len(noisy))
        drawn = {noisy[i] for i in torch.randperm(len(noisy), generator=generator)[:count].tolist()}
        weight = self.coefficient * len(noisy) / count
        for t in range(1, max(drawn) + 1):
            base = ReplayedStep(chain, trajectory, t, of_reference=True)
            if t in drawn:
                pull = self._pull(cotangent, base.output.detach(), chain.std(t))
                yield Segment(FIRST_ORDER, (t,), None, weight, into_parameters=pull)
            cotangent = base.into_latents(cotangent)

    def _pull(self, cotangent: torch.Tensor, base_mean: torch.Tensor, std: float) -> IntoParameters:
        def pull(
            t: int, mean: torch.Tensor, travelling: torch.Tensor | None
        ) -> tuple[torch.Tensor, Mapping[str, float]]:
            return cotangent - (mean - base_mean) / (self.scale * std**2), {}

        return pull


def _noisy(chain: Chain) -> list[int]:
    return [t for t in range(1, chain.num_steps + 1) if chain.std(t) > 0]
