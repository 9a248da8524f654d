"""A closed-form chain whose early steps are chaotic, and a reward as steep as the chain amplifies; all in float64."""

from collections.abc import Sequence
from typing import Protocol

import torch

from rlr_peft.chain import GaussianStep, PathPoint, step_std
from rlr_peft.prompt import PromptLike
from rlr_peft.testing import ReplicatedChain

# Stable Diffusion's noise levels.
TRAINING_STEPS, FIRST_BETA, LAST_BETA = 1000, 0.00085, 0.012


class GuidedMixtureChain(ReplicatedChain):
    """A chain whose denoiser is the exact posterior mean of a Gaussian mixture, with classifier-free guidance.

    Ancestral steps, eta = 1, over ``p(x_0) = 1/n sum_k N(m_k, width^2 I)``; the parameters are the means m_k. Half of
    the components are the condition's. Which component a sample ends in is decided by a softmax, so small changes early
    on may send it elsewhere; guidance sharpens that. This is how early steps of a real chain become chaotic: most
    samples are tame, and rare ones have pathwise gradients that are larger by orders of magnitude.

    Args:
        num_steps: T, on a trailing grid.
        dimension: size d of the latents.
        components: n, an even number.
        width: standard deviation of a component.
        guidance_scale: 1 samples the whole mixture, more leads to the first half of the components.
        reward_frequency: length of the reward's direction w: how fine the reward is.
        replicates: R, independent copies of the parameters.
        seed: seed of the constants.
    """

    def __init__(
        self,
        num_steps: int = 20,
        dimension: int = 16,
        components: int = 4,
        width: float = 0.5,
        guidance_scale: float = 1.0,
        reward_frequency: float = 3.0,
        replicates: int = 1,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(components, dimension, generator=generator, dtype=torch.float64)
        direction = torch.randn(dimension, generator=generator, dtype=torch.float64)
        self.reward_slope = reward_frequency * direction / dimension**0.5
        self.width, self.guidance_scale = width, guidance_scale
        self._unconditional_only = torch.arange(components) >= components // 2
        self._points = _path_points(num_steps)
        stds = [
            step_std("ancestral", current, following, eta=1.0)
            for following, current in zip(self._points, self._points[1:], strict=False)
        ]
        super().__init__(stds, dimension, [means], replicates)

    def output_sensitivity(self, t: int) -> float:
        current, following = self._points[t], self._points[t - 1]
        return abs(following.alpha - self._noise_kept(t) * current.alpha / current.sigma)

    def input_sensitivity(self, t: int) -> float:
        current, following = self._points[t], self._points[t - 1]
        return (following.alpha + self._noise_kept(t)) / (current.alpha + current.sigma)

    def prediction_sensitivity(self, t: int) -> float:
        return 1.0  # it outputs the prediction itself

    def path_point(self, t: int) -> PathPoint:
        return self._points[t]

    def step(self, latents: torch.Tensor, t: int, parameters: Sequence[torch.Tensor]) -> GaussianStep:
        """``a' x0 + sqrt(s'^2 - std^2) e`` with the guided posterior mean as x0."""
        current, following = self._points[t], self._points[t - 1]
        rows = latents.reshape(self.replicates, -1, self.dimension)
        prediction = self._guided_posterior_mean(rows, current, parameters[0]).reshape(latents.shape)
        noise = (latents - current.alpha * prediction) / current.sigma
        mean = following.alpha * prediction + self._noise_kept(t) * noise
        return GaussianStep(mean, self.std(t), prediction)

    def _noise_kept(self, t: int) -> float:
        return max(0.0, self._points[t - 1].sigma ** 2 - self.std(t) ** 2) ** 0.5

    def _guided_posterior_mean(self, rows: torch.Tensor, point: PathPoint, means: torch.Tensor) -> torch.Tensor:
        """(R, n, d) of rows (R, n, d) and means (R, K, d)."""
        variance = point.alpha**2 * self.width**2 + point.sigma**2
        offsets = rows[:, :, None] - point.alpha * means[:, None]
        log_weights = -offsets.square().sum(-1) / (2 * variance)
        by_component = means[:, None] + point.alpha * self.width**2 / variance * offsets

        def posterior_mean(log_weights: torch.Tensor) -> torch.Tensor:
            return (log_weights.softmax(-1)[..., None] * by_component).sum(2)

        unconditional = posterior_mean(log_weights)
        if self.guidance_scale == 1:
            return unconditional
        conditional = posterior_mean(log_weights.masked_fill(self._unconditional_only, -torch.inf))
        return unconditional + self.guidance_scale * (conditional - unconditional)


def _path_points(num_steps: int) -> list[PathPoint]:
    """Points 0..T of the path, from the clean end."""
    betas = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TRAINING_STEPS, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).sqrt()
    timesteps = torch.linspace(TRAINING_STEPS / num_steps - 1, TRAINING_STEPS - 1, num_steps).round().long()
    levels = [1.0, *alphas[timesteps].tolist()]
    return [PathPoint(alpha, max(0.0, 1 - alpha**2) ** 0.5) for alpha in levels]


class HasSlope(Protocol):
    """A chain that lends the direction w, (d,)."""

    reward_slope: torch.Tensor


class WaveReward:
    """``R = sin(w . x_0)``: bounded, but as steep as the chain amplifies, so that pathwise gradients become noise.

    Args:
        chain: holds w.
        differentiable: whether the estimators may use the gradient.
    """

    def __init__(self, chain: HasSlope, differentiable: bool = True) -> None:
        self._slope = chain.reward_slope
        self.differentiable = differentiable

    def score(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Rewards (B,)."""
        return torch.sin(latents @ self._slope)

    def score_with_gradient(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (B,) and their gradients (B, d)."""
        return self.score(latents, prompts), torch.cos(latents @ self._slope)[:, None] * self._slope
