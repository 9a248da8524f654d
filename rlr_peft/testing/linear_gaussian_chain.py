"""A linear-Gaussian chain whose reward gradient is known in closed form.

    x_{t-1} = M_t x_t + c_t v + sigma_t eps_t,      M_t = a_t I + b_t W,      R(x_0) = w . x_0 - x_0^T Q x_0 / 2

with parameters W and v. All moments of x_0 are polynomials of the parameters, so the gradient of E[R] is exact.

The parameters carry a leading replicate dimension: replicate r has its own (equal) copy and its own samples, so one
pass of an estimator over R * n samples yields R independent gradient estimates in the parameters' ``.grad``.
"""

from collections.abc import Sequence

import torch

from rlr_peft.chain.gaussian_step import GaussianStep
from rlr_peft.chain.trajectory import Trajectory


class LinearGaussianChain:
    """The chain; a second implementation of ``rlr_peft.chain.interface.Chain``, in float64.

    Args:
        num_steps: T.
        dimension: size d of the latents.
        replicates: R, independent copies of the parameters.
        last_std: sigma_1; 0 is legal, as for diffusers' default grids.
        seed: seed of the constants.
    """

    def __init__(
        self, num_steps: int = 6, dimension: int = 3, replicates: int = 1, last_std: float = 0.0, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.num_steps, self.dimension, self.replicates = num_steps, dimension, replicates
        self.denoiser_evaluations = 0
        self._stds = [last_std, *torch.linspace(0.25, 0.6, num_steps - 1, dtype=torch.float64).tolist()]
        self._decay = torch.linspace(0.95, 0.8, num_steps, dtype=torch.float64)
        self._gain = torch.linspace(0.3, 0.6, num_steps, dtype=torch.float64)
        self._shift = torch.linspace(0.5, 0.2, num_steps, dtype=torch.float64)
        matrix, vector = 0.3 * normal(dimension, dimension), 0.5 * normal(dimension)
        self.parameters = [
            torch.nn.Parameter(matrix.repeat(replicates, 1, 1)),
            torch.nn.Parameter(vector.repeat(replicates, 1)),
        ]
        self.reward_slope = normal(dimension)
        root = normal(dimension, dimension)
        self.reward_curvature = 0.3 * root @ root.T / dimension

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        return self._stds[t - 1]

    def output_sensitivity(self, t: int) -> float:
        """``|d mean / d (W x)|`` of step t."""
        return float(self._gain[t - 1])

    def draw_noises(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal noises (T + 1, B, d); fast, so all from the first seed."""
        generator = torch.Generator().manual_seed(seeds[0])
        return torch.randn(self.num_steps + 1, len(seeds), self.dimension, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Trajectory:
        """Samples R * n rows, the rows of one replicate side by side."""
        noises = self.draw_noises(seeds)
        latents = [noises[self.num_steps]]
        for t in range(self.num_steps, 0, -1):
            latents.append(self._mean(latents[-1], t) + self.std(t) * noises[t - 1])
        return Trajectory(
            prompts=list(prompts),
            latents=torch.stack(latents).flip(0),
            noises=noises,
            stds=tuple(self._stds),
            pred_original_samples=torch.zeros_like(noises[1:]),
        )

    def replay(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more."""
        latents = trajectory.latents[t] if latents is None else latents
        self.denoiser_evaluations += len(latents)
        return GaussianStep(self._mean(latents, t), self.std(t), latents)

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
            latents = self._mean(latents, t) + self.std(t) * noises[t - 1]
        self.denoiser_evaluations += len(latents) * (start - stop)
        return latents

    def exact_gradient(self) -> list[torch.Tensor]:
        """Gradient of E[R(x_0)] by (W, v) of one replicate, shapes (d, d) and (d,)."""
        matrix, vector = (parameter[0].detach().clone().requires_grad_() for parameter in self.parameters)
        identity = torch.eye(self.dimension, dtype=torch.float64)
        mean, covariance = torch.zeros(self.dimension, dtype=torch.float64), identity
        for t in range(self.num_steps, 0, -1):
            transition = self._decay[t - 1] * identity + self._gain[t - 1] * matrix
            mean = transition @ mean + self._shift[t - 1] * vector
            covariance = transition @ covariance @ transition.T + self.std(t) ** 2 * identity
        curvature = self.reward_curvature
        expected = self.reward_slope @ mean - (mean @ curvature @ mean + (curvature * covariance).sum()) / 2
        return list(torch.autograd.grad(expected, [matrix, vector]))

    def _mean(self, latents: torch.Tensor, t: int) -> torch.Tensor:
        matrix, vector = self.parameters
        rows = latents.reshape(self.replicates, -1, self.dimension)
        linear = torch.einsum("rij,rnj->rni", matrix, rows)
        mean = self._decay[t - 1] * rows + self._gain[t - 1] * linear + self._shift[t - 1] * vector[:, None]
        return mean.reshape(latents.shape)


class QuadraticReward:
    """``R(x_0) = w . x_0 - x_0^T Q x_0 / 2`` as an ``Objective``.

    Args:
        chain: holds w and Q.
        differentiable: whether the estimators may use the gradient.
    """

    def __init__(self, chain: LinearGaussianChain, differentiable: bool = True) -> None:
        self._chain = chain
        self.differentiable = differentiable

    def score(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards (B,)."""
        quadratic = torch.einsum("bi,ij,bj->b", latents, self._chain.reward_curvature, latents)
        return latents @ self._chain.reward_slope - quadratic / 2

    def score_with_gradient(self, latents: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (B,) and their gradients (B, d)."""
        return self.score(latents, prompts), self._chain.reward_slope - latents @ self._chain.reward_curvature
