"""A linear-Gaussian chain whose reward gradient is known in closed form.

    x_{t-1} = M_t x_t + c_t v + sigma_t eps_t,      M_t = a_t I + b_t W,      R(x_0) = w . x_0 - x_0^T Q x_0 / 2

with parameters W and v. All moments of x_0 are polynomials of the parameters, so the gradient of E[R] is exact.
``W x`` plays the denoiser's output, from which the prediction of x_0 follows too: the remaining steps without noise, to
first order in the parameters.
"""

from collections.abc import Sequence

import torch

from rlr_peft.chain.path import GaussianStep
from rlr_peft.testing.replicated_chain import ReplicatedChain


class LinearGaussianChain(ReplicatedChain):
    """The chain; a second implementation of ``rlr_peft.chain.interface.Chain``, in float64.

    Args:
        num_steps: T.
        dimension: size d of the latents.
        replicates: R, independent copies of the parameters.
        last_std: sigma_1; 0 is legal, as for diffusers' default grids.
        decay: a_1 and a_T, linear in between; above 1 the chain amplifies what it is given.
        gain: b_1 and b_T, linear in between: how much the parameters matter at every step.
        seed: seed of the constants.
    """

    def __init__(
        self,
        num_steps: int = 6,
        dimension: int = 3,
        replicates: int = 1,
        last_std: float = 0.0,
        decay: tuple[float, float] = (0.95, 0.8),
        gain: tuple[float, float] = (0.3, 0.6),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self._decay = torch.linspace(*decay, num_steps, dtype=torch.float64)
        self._gain = torch.linspace(*gain, num_steps, dtype=torch.float64)
        self._shift = torch.linspace(0.5, 0.2, num_steps, dtype=torch.float64)
        matrix, vector = 0.3 * normal(dimension, dimension), 0.5 * normal(dimension)
        stds = [last_std, *torch.linspace(0.25, 0.6, num_steps - 1, dtype=torch.float64).tolist()]
        super().__init__(stds, dimension, [matrix, vector], replicates)
        self._prediction = self._prediction_coefficients()
        self.reward_slope = normal(dimension)
        root = normal(dimension, dimension)
        self.reward_curvature = 0.3 * root @ root.T / dimension

    def output_sensitivity(self, t: int) -> float:
        """``|d mean / d (W x)|`` of step t."""
        return float(self._gain[t - 1])

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

    def step(self, latents: torch.Tensor, t: int, parameters: Sequence[torch.Tensor]) -> GaussianStep:
        """``M_t x_t + c_t v + sigma_t eps_t``."""
        matrix, vector = parameters
        rows = latents.reshape(self.replicates, -1, self.dimension)
        output = rows @ matrix.mT

        def combined(decay: float, gain: float, shift: float) -> torch.Tensor:
            return (decay * rows + gain * output + shift * vector[:, None]).reshape(latents.shape)

        mean = combined(*self._transition(t))
        return GaussianStep(mean, self.std(t), combined(*self._prediction[t - 1]))

    def _transition(self, t: int) -> tuple[float, float, float]:
        return float(self._decay[t - 1]), float(self._gain[t - 1]), float(self._shift[t - 1])

    def _prediction_coefficients(self) -> list[tuple[float, float, float]]:
        """Of x, W x and v in the prediction of every step: the steps below, one after the other."""
        coefficients = []
        decay, gain, shift = 1.0, 0.0, 0.0
        for t in range(1, self.num_steps + 1):
            a, b, c = self._transition(t)
            decay, gain, shift = decay * a, decay * b + gain * a, decay * c + shift
            coefficients.append((decay, gain, shift))
        return coefficients


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
