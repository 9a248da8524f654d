"""The Gaussian steps of a chain, and what estimators need of one.

Every supported model lives on a path ``x = alpha * x_0 + sigma * eps`` (diffusion: ``alpha**2 + sigma**2 = 1``;
flow matching: ``alpha + sigma = 1``). A step moves from one point of the path to the next:

    next = mean + std * noise,        noise ~ N(0, I)

and the four kinds of steps differ in ``mean`` and ``std`` alone, which pure functions give. What a sampled chain leaves
behind, a ``Trajectory``, is enough to replay any step exactly. Estimators see a ``Chain`` and never a pipeline: a
closed-form chain proves them unbiased.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch

from rlr_peft.config.chain import StepKind
from rlr_peft.prompt import Prompt, PromptLike

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction"]

# A last step whose clean latents move less than this per unit of denoiser output hardly trains.
DEAD_STEP = 0.05


@dataclass(frozen=True)
class PathPoint:
    """A place on the noising path ``x = alpha * x_0 + sigma * eps``.

    Attributes:
        alpha: weight of the clean latents, in [0, 1].
        sigma: weight of the noise, in [0, 1].
    """

    alpha: float
    sigma: float

    @property
    def scale(self) -> float:
        """What the latents are divided by on the flow path that any path becomes by rescaling."""
        return self.alpha + self.sigma

    @property
    def noise_share(self) -> float:
        """sigma on that flow path, in [0, 1]: its time."""
        return self.sigma / self.scale


@dataclass(frozen=True)
class Grid:
    """The points of the noising path that a chain visits, noise first.

    Attributes:
        timesteps: what the denoiser is told at every step, noise first, (T,).
        points: where each step starts, noise first, length T.
        followings: where each step leads, length T.
    """

    timesteps: torch.Tensor
    points: tuple[PathPoint, ...]
    followings: tuple[PathPoint, ...]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.points)

    def step_points(self, t: int) -> tuple[PathPoint, PathPoint]:
        """Start and end of step t, T first and 1 last."""
        return self.points[self.num_steps - t], self.followings[self.num_steps - t]


@dataclass(frozen=True)
class GaussianStep:
    """The distribution of the next latents given the current ones.

    Attributes:
        mean: mean of the next latents, (B, ...).
        std: standard deviation of the next latents, the same for every element; 0 for a deterministic step.
        pred_original_sample: the denoiser's own prediction of the clean latents x_0, (B, ...).
    """

    mean: torch.Tensor
    std: float
    pred_original_sample: torch.Tensor

    def next_latents(self, noise: torch.Tensor) -> torch.Tensor:
        """``mean + std * noise``, (B, ...)."""
        return self.mean + self.std * noise if self.std > 0 else self.mean


def predict_original_and_noise(
    prediction_type: PredictionType, sample: torch.Tensor, model_output: torch.Tensor, point: PathPoint
) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits the latents into predicted clean latents and predicted noise.

    Args:
        prediction_type: what the denoiser was trained to output.
        sample: current latents x_t, (B, ...).
        model_output: output of the denoiser after guidance, (B, ...).
        point: where on the path ``sample`` lies.

    Returns:
        ``(pred_original_sample, pred_noise)``, each (B, ...).

    Raises:
        ValueError: epsilon prediction at pure noise (alpha = 0), where the clean latents are undetermined, or an
            unknown prediction type.
    """
    alpha, sigma = point.alpha, point.sigma
    if prediction_type == "epsilon":
        if alpha == 0:
            raise ValueError(
                "Expected alpha > 0 for epsilon prediction, got a step at pure noise (alpha = 0). "
                "Load the scheduler with rescale_betas_zero_snr=False or use a v-prediction model."
            )
        return (sample - sigma * model_output) / alpha, model_output
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample
    if prediction_type == "flow_prediction":
        return sample - sigma * model_output, sample + alpha * model_output
    raise ValueError(f"Expected prediction_type in {get_args(PredictionType)}, got {prediction_type!r}.")


def gaussian_step(
    kind: StepKind,
    prediction_type: PredictionType,
    sample: torch.Tensor,
    model_output: torch.Tensor,
    current: PathPoint,
    following: PathPoint,
    eta: float,
) -> GaussianStep:
    """The Gaussian step from ``current`` to ``following``.

    Args:
        kind: ``ancestral`` (equals DDIM with the same eta, Euler-ancestral and first-order SDE-DPM-Solver++),
            ``cps`` (coefficient-preserving sampling), ``flow-sde`` (Flow-GRPO, on any path by rescaling it to the
            flow-matching path) or ``ode`` (no noise).
        sample: current latents x_t, (B, ...).
        model_output: output of the denoiser after guidance, (B, ...).
        current: path point of ``sample``.
        following: path point of the next latents, with less noise.
        eta: amount of noise; 0 gives the deterministic step, 1 the kind's full noise.
    """
    pred_original_sample, pred_noise = predict_original_and_noise(prediction_type, sample, model_output, current)
    mean, std = _mean_and_std(kind, pred_original_sample, pred_noise, current, following, eta)
    return GaussianStep(mean, std, pred_original_sample)


def _mean_and_std(
    kind: StepKind,
    pred_original_sample: torch.Tensor,
    pred_noise: torch.Tensor,
    current: PathPoint,
    following: PathPoint,
    eta: float,
) -> tuple[torch.Tensor, float]:
    if kind == "flow-sde":
        return _flow_sde(pred_original_sample, pred_noise, current, following, eta)
    std = step_std(kind, current, following, eta)
    return following.alpha * pred_original_sample + math.sqrt(following.sigma**2 - std**2) * pred_noise, std


def step_std(kind: StepKind, current: PathPoint, following: PathPoint, eta: float) -> float:
    """Standard deviation of a step; it depends on the grid alone, not on the latents.

    Raises:
        ValueError: unknown kind, or eta out of range: at least 0, and at most 1 except for ``flow-sde``.
    """
    if eta < 0 or (eta > 1 and kind in ("ancestral", "cps")):
        raise ValueError(f"Expected eta in [0, 1] for {kind} steps, got {eta}.")
    if kind == "ode":
        return 0.0
    if kind == "ancestral":
        ratio = current.alpha * following.sigma / (following.alpha * current.sigma)
        return eta * following.sigma * math.sqrt(max(0.0, 1 - ratio**2))
    if kind == "cps":
        return following.sigma * math.sin(eta * math.pi / 2)
    if kind == "flow-sde":
        sigma, next_sigma = current.noise_share, following.noise_share
        return following.scale * _flow_sde_std(sigma, next_sigma, eta)
    raise ValueError(f"Expected step_kind in {get_args(StepKind)}, got {kind!r}.")


def output_sensitivity(
    kind: StepKind, prediction_type: PredictionType, current: PathPoint, following: PathPoint, eta: float
) -> float:
    """``|d mean / d model_output|`` of a step: a number, since the mean is affine in the denoiser's output."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    return abs(float(gaussian_step(kind, prediction_type, zero, one, current, following, eta).mean))


def prediction_sensitivity(prediction_type: PredictionType, point: PathPoint) -> float:
    """``|d prediction of x_0 / d model_output|`` at a point: a number."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    return abs(float(predict_original_and_noise(prediction_type, zero, one, point)[0]))


def input_sensitivity(kind: StepKind, current: PathPoint, following: PathPoint, eta: float) -> float:
    """``d mean / d x_t`` of a step with the flow velocity ``u = eps - x_0`` held fixed: a number.

    With ``s = sigma / (alpha + sigma)`` the rescaled latents are ``x / (alpha + sigma) = x_0 + s u``, so that x_0 and
    eps both move by ``1 / (alpha + sigma)``. For steps other than ``flow-sde`` it comes to
    ``(alpha' + sqrt(sigma'^2 - std^2)) / (alpha + sigma)``.
    """
    moved = torch.tensor(1 / current.scale, dtype=torch.float64)
    return float(_mean_and_std(kind, moved, moved, current, following, eta)[0])


def leap(
    latents: torch.Tensor, pred_original_sample: torch.Tensor, current: PathPoint, destination: PathPoint
) -> torch.Tensor:
    """Where one deterministic step from ``current`` leads, however far, (B, ...).

    Args:
        latents: x at ``current``, (B, ...).
        pred_original_sample: the prediction of x_0 made from them, (B, ...).
        current: has noise, sigma > 0.
    """
    noise_kept = destination.sigma / current.sigma
    return noise_kept * latents + (destination.alpha - noise_kept * current.alpha) * pred_original_sample


def _flow_sde(
    pred_original_sample: torch.Tensor,
    pred_noise: torch.Tensor,
    current: PathPoint,
    following: PathPoint,
    eta: float,
) -> tuple[torch.Tensor, float]:
    """Flow-GRPO's step. Dividing x by ``alpha + sigma`` turns any path into the flow path, where it is defined."""
    sigma, next_sigma = current.noise_share, following.noise_share
    latents = (1 - sigma) * pred_original_sample + sigma * pred_noise
    velocity = pred_noise - pred_original_sample
    scale = following.scale
    step = next_sigma - sigma
    if next_sigma == 0:  # noise here would stay in the image: the last step is the plain flow
        return scale * (latents + velocity * step), 0.0
    diffusion = _flow_sde_diffusion(sigma, next_sigma, eta)
    drift = diffusion**2 / (2 * sigma)
    mean = latents * (1 + drift * step) + velocity * (1 + drift * (1 - sigma)) * step
    return scale * mean, scale * _flow_sde_std(sigma, next_sigma, eta)


def _flow_sde_diffusion(sigma: float, next_sigma: float, eta: float) -> float:
    clean_share = 1 - (next_sigma if sigma == 1 else sigma)
    return eta * math.sqrt(sigma / clean_share)


def _flow_sde_std(sigma: float, next_sigma: float, eta: float) -> float:
    if next_sigma == 0:
        return 0.0
    return _flow_sde_diffusion(sigma, next_sigma, eta) * math.sqrt(sigma - next_sigma)


@dataclass(frozen=True)
class Trajectory:
    """One batch of samples from noise to clean latents, in which steps count as in the paper: t = T first, t = 1 last.

    Attributes:
        prompts: the prompt of every sample, length B.
        latents: ``latents[t]`` is x_t, from the clean ``latents[0]`` to the noise ``latents[T]``; (T + 1, B, ...).
        noises: standard normal draws, (T + 1, B, ...); ``noises[t - 1]`` drives step t and ``noises[T]`` is x_T.
        stds: ``stds[t - 1]`` is the standard deviation of step t, length T.
        pred_original_samples: ``pred_original_samples[t - 1]`` is the prediction of x_0 made at step t, (T, B, ...).
        dropout_seed: seed of LoRA dropout's masks, so that a replay drops what sampling dropped.
    """

    prompts: list[Prompt]
    latents: torch.Tensor
    noises: torch.Tensor
    stds: tuple[float, ...]
    pred_original_samples: torch.Tensor
    dropout_seed: int = 0

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.stds)

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return len(self.prompts)

    def std(self, t: int) -> float:
        """Standard deviation of step t."""
        return self.stds[t - 1]

    def noise(self, t: int) -> torch.Tensor:
        """The standard normal draw of step t, (B, ...); ``noise(T + 1)`` is the initial latents."""
        return self.noises[t - 1]

    def mean(self, t: int) -> torch.Tensor:
        """The mean of step t by the weights that sampled it, (B, ...): what is left of x_{t-1} without its noise."""
        return self.latents[t - 1] - self.std(t) * self.noise(t)

    def select(self, samples: list[int]) -> "Trajectory":
        """The trajectory of some of the samples."""
        return replace(
            self,
            prompts=[self.prompts[i] for i in samples],
            latents=self.latents[:, samples],
            noises=self.noises[:, samples],
            pred_original_samples=self.pred_original_samples[:, samples],
        )


class Chain(Protocol):
    """A chain ``x_T -> ... -> x_0`` of Gaussian steps with trainable parameters; t = T is the first step, 1 the last.

    Attributes:
        num_steps: T.
        denoiser_evaluations: number of single-sample denoiser evaluations so far; a guided pair counts once.
        departures: what makes the derivatives of its steps others than those of the samples, one clause each.
    """

    num_steps: int
    denoiser_evaluations: int

    @property
    def trained_models(self) -> int:
        """How many models with trainable parameters share out the steps: two with both experts of Wan 2.2, else one."""

    @property
    def mixes_samples(self) -> bool:
        """Whether a sample's step depends on the others of its batch, as masks of LoRA dropout do."""

    @property
    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """The trainable parameters, in a fixed order."""

    @property
    def departures(self) -> tuple[str, ...]:
        """See above."""

    def std(self, t: int) -> float:
        """Standard deviation of step t; 0 where the step is deterministic."""

    def output_sensitivity(self, t: int) -> float:
        """``|d mean / d denoiser output|`` of step t."""

    def input_sensitivity(self, t: int) -> float:
        """``d mean / d x_t`` of step t with the flow velocity held fixed."""

    def prediction_sensitivity(self, t: int) -> float:
        """``|d prediction of x_0 / d denoiser output|`` of step t."""

    def path_point(self, t: int) -> PathPoint:
        """Where on the noising path x_t lies; t = 0 is the clean end."""

    def sample(
        self, prompts: Sequence[PromptLike], seeds: Sequence[int], noises: torch.Tensor | None = None
    ) -> Trajectory:
        """Samples the chain without a tape; sample i depends on ``seeds[i]`` alone, whatever its batch.

        ``noises`` are used instead of those that ``draw_noises`` makes of the seeds, where they are given.
        """

    def replay(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more, on the tape if gradients are enabled; from ``latents`` if given, else the stored x_t."""

    def without_guidance(self) -> AbstractContextManager[None]:
        """Inside, replays are of the conditional prediction alone."""

    def separate_samples(self, count: int) -> AbstractContextManager[None] | None:
        """Inside, batches of ``count`` samples are replayed with parameters (count, ...), each sample with its own.

        They all have the parameters' values, and derivatives by them are those of single samples. None if the chain
        cannot.
        """

    def replay_reference(self, trajectory: Trajectory, t: int, latents: torch.Tensor | None = None) -> GaussianStep:
        """Step t once more by the reference, the base without adapter."""

    def denoise(
        self,
        trajectory: Trajectory,
        start: int,
        latents: torch.Tensor,
        stop: int = 0,
        noises: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs steps ``start, ..., stop + 1`` without a tape from x_start = ``latents``; returns x_stop, (B, ...).

        The trajectory lends its prompts, and its noises unless others are given in the same layout.
        """

    def draw_noises(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal noises in the layout of ``Trajectory.noises``, (T + 1, B, ...)."""


def noisy_steps(chain: Chain) -> list[int]:
    """Its steps that have noise, from 1 on."""
    return [t for t in range(1, chain.num_steps + 1) if chain.std(t) > 0]


class Decoder(Protocol):
    """Turns clean latents into images."""

    def decode(self, latents: torch.Tensor, prompts: Sequence[PromptLike]) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of clean latents (B, ...), on the tape if gradients are enabled."""
