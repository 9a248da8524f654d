"""Chains with known gradients and known faults, and rewards for them: what estimators are measured against.

All are in float64. The parameters carry a leading replicate dimension: replicate r has its own (equal) copy and its own
samples, so one pass of an estimator over R * n samples yields R independent gradient estimates in the parameters'
``.grad``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from rlr_peft.chain.steps import GaussianStep, PathPoint, Trajectory
from rlr_peft.prompt import PromptLike, as_prompts


class ReplicatedChain(ABC):
    """A chain of ``rlr_peft.chain.steps.Chain`` whose step is a formula, in float64.

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
        mixes_samples: False, no sample's step depends on the others.
        trained_models: 1, that takes all steps.
        departures: none, as its derivatives are those of its samples.
    """

    departures: tuple[str, ...] = ()

    mixes_samples = False
    trained_models = 1

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

    @abstractmethod
    def input_sensitivity(self, t: int) -> float:
        """``d mean / d x_t`` of step t with the denoiser's velocity, or output, held fixed."""

    @abstractmethod
    def prediction_sensitivity(self, t: int) -> float:
        """``|d prediction of x_0 / d denoiser output|`` of step t."""

    @abstractmethod
    def path_point(self, t: int) -> PathPoint:
        """Where on the noising path x_t lies; t = 0 is the clean end."""

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        return self._stds[t - 1]

    def draw_noises(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal noises (T + 1, B, d); fast, so all from the first seed."""
        generator = torch.Generator().manual_seed(seeds[0])
        return torch.randn(self.num_steps + 1, len(seeds), self.dimension, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[PromptLike], seeds: Sequence[int], noises: torch.Tensor | None = None
    ) -> Trajectory:
        """Samples R * n rows; from these noises if given."""
        noises = self.draw_noises(seeds) if noises is None else noises
        latents, predictions = [noises[self.num_steps]], []
        for t in range(self.num_steps, 0, -1):
            step = self.step(latents[-1], t, self.parameters)
            latents.append(step.next_latents(noises[t - 1]))
            predictions.append(step.pred_original_sample)
        return Trajectory(
            prompts=as_prompts(prompts),
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

    def without_guidance(self) -> AbstractContextManager[None]:
        """There is none."""
        return nullcontext()

    def separate_samples(self, count: int) -> AbstractContextManager[None] | None:
        """As many replicates as samples; None of a chain that has several already."""
        return None if self.replicates > 1 else self._separated(count)

    @contextmanager
    def _separated(self, count: int) -> Iterator[None]:
        shared, self.replicates = self.parameters, count
        self.parameters = [torch.nn.Parameter(p.detach().expand(count, *p.shape[1:])) for p in shared]
        try:
            yield
        finally:
            self.parameters, self.replicates = shared, 1

    def replay_reference(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more with the parameters that the chain was built with."""
        latents = trajectory.latents[t] if latents is None else latents
        self.denoiser_evaluations += len(latents)
        return self.step(latents, t, self._reference)

    @torch.no_grad()
    def denoise(
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


class LinearGaussianChain(ReplicatedChain):
    """A chain whose reward gradient is known in closed form.

        x_{t-1} = M_t x_t + c_t v + sigma_t eps_t,      M_t = a_t I + b_t W,      R(x_0) = w . x_0 - x_0^T Q x_0 / 2

    with parameters W and v. All moments of x_0 are polynomials of the parameters, so the gradient of E[R] is exact.
    ``W x`` plays the denoiser's output, from which the prediction of x_0 follows too: the remaining steps without
    noise, to first order in the parameters.

    Args:
        num_steps: T.
        dimension: size d of the latents.
        replicates: R, independent copies of the parameters.
        last_std: sigma_1; 0 is legal, as for diffusers' default grids.
        decay: a_1 and a_T, linear in between; above 1 the chain amplifies what it is given.
        gain: b_1 and b_T, linear in between: how much the parameters matter at every step.
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
        return float(self._gain[t - 1])

    def input_sensitivity(self, t: int) -> float:
        return float(self._decay[t - 1])

    def prediction_sensitivity(self, t: int) -> float:
        return abs(self._prediction[t - 1][1])

    def path_point(self, t: int) -> PathPoint:
        """The flow path: it matters to leaps and to fresh noise alone, which no closed form knows."""
        return PathPoint(1 - t / self.num_steps, t / self.num_steps)

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
        differentiable: whether the estimators may use the gradient.
    """

    def __init__(self, chain: LinearGaussianChain, differentiable: bool = True) -> None:
        self._chain = chain
        self.differentiable = differentiable

    def score(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Rewards (B,)."""
        quadratic = torch.einsum("bi,ij,bj->b", latents, self._chain.reward_curvature, latents)
        return latents @ self._chain.reward_slope - quadratic / 2

    def score_with_gradient(
        self, latents: torch.Tensor, prompts: Sequence[PromptLike]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (B,) and their gradients (B, d)."""
        return self.score(latents, prompts), self._chain.reward_slope - latents @ self._chain.reward_curvature
