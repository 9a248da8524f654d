"""What the closed-form chains share: sampling and replaying in float64, with replicated parameters.

The parameters carry a leading replicate dimension: replicate r has its own (equal) copy and its own samples, so one
pass of an estimator over R * n samples yields R independent gradient estimates in the parameters' ``.grad``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from rlr_peft.chain.path import GaussianStep
from rlr_peft.chain.trajectory import Trajectory


class ReplicatedChain(ABC):
    """A chain of ``rlr_peft.chain.interface.Chain`` whose step is a formula, in float64.

    Args:
        stds: standard deviation of every step, at index t - 1.
        parameters: of one copy of the chain.
        replicates: R, independent copies of the parameters.

    Attributes:
        num_steps: T.
        dimension: size d of the latents.
        replicates: R.
        parameters: each (R, ...).
        denoiser_evaluations: number of single-sample evaluations so far.
    """

    def __init__(self, stds: Sequence[float], dimension: int, parameters: Sequence[torch.Tensor], replicates: int):
        self.num_steps, self.dimension, self.replicates = len(stds), dimension, replicates
        self.denoiser_evaluations = 0
        self._stds = list(stds)
        self.parameters = [torch.nn.Parameter(p.expand(replicates, *p.shape).clone()) for p in parameters]
        self._reference = [parameter.detach().clone() for parameter in self.parameters]

    @abstractmethod
    def step(self, latents: torch.Tensor, t: int, parameters: Sequence[torch.Tensor]) -> GaussianStep:
        """Step t from latents (R * n, d), the rows of one replicate side by side."""

    @abstractmethod
    def output_sensitivity(self, t: int) -> float:
        """``|d mean / d denoiser output|`` of step t."""

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        return self._stds[t - 1]

    def draw_noises(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal noises (T + 1, B, d); fast, so all from the first seed."""
        generator = torch.Generator().manual_seed(seeds[0])
        return torch.randn(self.num_steps + 1, len(seeds), self.dimension, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], noises: torch.Tensor | None = None) -> Trajectory:
        """Samples R * n rows; from these noises if given."""
        noises = self.draw_noises(seeds) if noises is None else noises
        latents, predictions = [noises[self.num_steps]], []
        for t in range(self.num_steps, 0, -1):
            step = self.step(latents[-1], t, self.parameters)
            latents.append(step.next_latents(noises[t - 1]))
            predictions.append(step.pred_original_sample)
        return Trajectory(
            prompts=list(prompts),
            latents=torch.stack(latents).flip(0),
            noises=noises,
            stds=tuple(self._stds),
            pred_original_samples=torch.stack(predictions).flip(0),
        )

    def replay(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more."""
        latents = trajectory.latents[t] if latents is None else latents
        self.denoiser_evaluations += len(latents)
        return self.step(latents, t, self.parameters)

    @torch.no_grad()
    def reference_mean(self, trajectory: Trajectory, t: int) -> torch.Tensor:
        """The mean of step t with the parameters that the chain was built with."""
        self.denoiser_evaluations += trajectory.batch_size
        return self.step(trajectory.latents[t], t, self._reference).mean

    @torch.no_grad()
    def rollout(
        self,
        trajectory: Trajectory,
        start: int,
        latents: torch.Tensor,
        stop: int = 0,
        noises: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs steps ``start, ..., stop + 1``."""
        noises = trajectory.noises if noises is None else noises
        for t in range(start, stop, -1):
            latents = self.step(latents, t, self.parameters).next_latents(noises[t - 1])
        self.denoiser_evaluations += len(latents) * (start - stop)
        return latents
