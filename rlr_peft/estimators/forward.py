"""Forward-process RL: images are noised afresh, and the denoiser is regressed towards those that scored well.

No likelihoods, no noise in the chain, no tape but one denoiser step: the sampler may be any solver, the reward any
function. At some levels of the sampler an image x_0 becomes ``x = alpha x_0 + sigma e``. Let o be the denoiser's own
output there without guidance (epsilon, v or velocity) and u what it was trained to output. With ``d = o - o_old``,
``g = u - o_old``, the advantage A and means over the D latent dimensions, the losses are

| | loss | source |
|---|---|---|
| RAM | ``|o - o_base - m A g|^2`` | 2605.10759 |
| NFT | ``c / b [p |g - b d|^2 / w+ + (1 - p) |g + b d|^2 / w-]``, ``p = A / 2c + 1/2`` | 2509.16117 |
| AWM | ``- A r``, clipped, with the ratio ``r = exp(|g|^2 - |g - d|^2)``; ``+ |d|^2`` | 2509.25050 |

where ``w+- = mean |g -+ b d|`` is not differentiated. NFT and AWM may add a pull to the base, ``|o - o_base|^2``. At
``o = o_old`` each of them moves the parameters by ``sum c A J^T (u - o_old)``. The expectation of ``A (u - o_old)`` is
the covariance of reward and target given x: the direction of the score-function gradient of that step, for a model that
is exact, with another length at every level.

Losses live in the denoiser's own output, where the pretraining weighed the levels. (In x_0, epsilon models would be
weighed by (sigma / alpha)^2, several hundred at the noisiest levels.) NFT's published loss is in the x_0 of flow
models, which multiplies it by the share of noise s; so it does here for all models, ``s = sigma / (alpha + sigma)``.

The images of a prompt get the same noises, at the same levels. Their advantages add up to zero, so that what a noise
does to all of them alike cancels; the mean over the noises stays the same (`benchmarks/update_directions`).

`old` is a copy of the adapter's weights that lags behind by a moving average, put in their place for its evaluations;
`base` is the adapter switched off. Neither is a second model in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Self

import torch

from rlr_peft.chain.adjoint import Segment, per_sample
from rlr_peft.chain.steps import Chain, PathPoint
from rlr_peft.config.policy import AWMArguments, BasePulledArguments, ForwardArguments, NFTArguments, RAMArguments
from rlr_peft.estimators.advantages import group_normalized, normalised_in_words
from rlr_peft.estimators.base import Book, Coverage, Estimator, RunShape
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.prompt import Prompt, texts_of
from rlr_peft.reports import counted

# Keeps NFT's division by the size of its own error finite.
SMALLEST_ERROR = 1e-5


@dataclass(frozen=True)
class LevelOutputs:
    """What the denoiser outputs at one level of one micro-batch, compared.

    Attributes:
        moved: d, present output minus that of the old weights, (B, ...).
        residual: g, training target minus the output of the old weights, (B, ...).
        from_base: present output minus the base's, (B, ...); None where nothing asks for it.
        advantages: A, (B,).
        noise_share: of the level.
    """

    moved: torch.Tensor
    residual: torch.Tensor
    from_base: torch.Tensor | None
    advantages: torch.Tensor
    noise_share: float


# Minus the derivative of a loss, times D, by the present output, (B, ...); and numbers for the logs.
Pull = Callable[[LevelOutputs], tuple[torch.Tensor, Mapping[str, float]]]


def ram_pull(compared: LevelOutputs, *, scale: float) -> tuple[torch.Tensor, Mapping[str, float]]:
    """RAM: the base's output, moved by ``scale`` times the advantage towards the image."""
    assert compared.from_base is not None
    wanted = per_sample(scale * compared.advantages, compared.residual) * compared.residual
    return 2 * (wanted - compared.from_base), {}


def nft_pull(compared: LevelOutputs, *, beta: float, clip: float) -> tuple[torch.Tensor, Mapping[str, float]]:
    """NFT: good images attract, and bad ones attract the mirror image of the present output.

    Args:
        compared: advantages within ``-clip .. clip``.
        beta: b, how far the two outputs that are compared lie from the old one; in (0, 1].
        clip: c.
    """
    good = compared.residual - beta * compared.moved
    bad = compared.residual + beta * compared.moved
    share = per_sample(compared.advantages / (2 * clip) + 0.5, good)
    difference = share * _by_its_size(good) - (1 - share) * _by_its_size(bad)
    return 2 * clip * compared.noise_share * difference, {}


def awm_pull(compared: LevelOutputs, *, clip: float, old_pull: float) -> tuple[torch.Tensor, Mapping[str, float]]:
    """AWM: the likelihood ratio of a policy gradient, with the matching error in place of minus the log likelihood.

    Args:
        compared: of one level.
        clip: ratios count within 1 - clip .. 1 + clip.
        old_pull: weight of the squared distance from the old output.
    """
    error = compared.residual - compared.moved
    ratio = (_mean_square(compared.residual) - _mean_square(error)).exp()
    advantages = compared.advantages.to(ratio)
    clipped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    factor = torch.where(clipped | (advantages == 0), 0.0, advantages * ratio)
    numbers = {"policy_ratio_deviation": float((ratio - 1).abs().mean())}
    return 2 * (per_sample(factor, error) * error - old_pull * compared.moved), numbers


def pull_and_name(arguments: ForwardArguments) -> tuple[Pull, str]:
    """A method's loss, by its knobs, and in words."""
    match arguments:
        case RAMArguments():
            return partial(ram_pull, scale=arguments.reward_scale), f"RAM with scale {arguments.reward_scale:g}"
        case NFTArguments():
            pull = partial(nft_pull, beta=arguments.nft_beta, clip=arguments.advantage_clip)
            return pull, f"DiffusionNFT with beta {arguments.nft_beta:g}"
        case AWMArguments():
            pull = partial(awm_pull, clip=arguments.clip_range, old_pull=arguments.old_pull)
            return pull, f"AWM with ratios clipped at {arguments.clip_range:g}, pull to the old {arguments.old_pull:g}"
        case _:
            raise TypeError(f"expected a forward-process method, got {arguments.estimator}")


class ForwardEstimator(Estimator):
    """RAM, DiffusionNFT or AWM: one segment for every drawn level, of the prediction made from a fresh noising.

    After N updates the old weights are a moving average with the decay ``min(old_decay, N old_decay_growth)``.
    """

    shares_draws = True
    needs_noise = False
    goes_back = True  # nothing but the pulls holds these losses

    def __init__(self, arguments: ForwardArguments) -> None:
        self.arguments = arguments
        self.advantage_clip = arguments.advantage_clip
        self.inner_epochs = arguments.inner_epochs
        self.base_pull = arguments.base_pull if isinstance(arguments, BasePulledArguments) else 0.0
        self.asks_base = isinstance(arguments, RAMArguments) or self.base_pull > 0 or arguments.norm_penalty > 0
        self._pull, self._name = pull_and_name(arguments)
        self._old: list[torch.Tensor] = []
        self._updates = self._followed = 0

    @classmethod
    def from_arguments(cls, arguments: ForwardArguments, shape: RunShape) -> Self:
        return cls(arguments)

    def describe(self, has_gradient: bool | None = None) -> str:
        knobs = self.arguments
        words = [
            f"{self._name} on {counted(knobs.noise_levels, 'fresh noising')} of every image",
            f"{normalised_in_words(knobs.advantage_std)} advantages clipped at {knobs.advantage_clip:g}",
            f"old weights with decay up to {knobs.old_decay:g}",
        ]
        words += [f"pull to the base {self.base_pull:g}"] if self.base_pull else []
        words += [f"norm penalty {knobs.norm_penalty:g}"] if knobs.norm_penalty else []
        words += [f"{knobs.inner_epochs} inner epochs"] if knobs.inner_epochs > 1 else []
        return ", ".join(words)

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        """No step of the chain is covered: none is differentiated."""
        departure = "the denoiser follows noised images, weighted by their advantages, in place of the chain's gradient"
        return Coverage(torch.zeros(chain.num_steps, dtype=torch.float64), {}, departures=(departure,))

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        return self._clipped_advantages(group_normalized(rewards, group_size, self.arguments.advantage_std))

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterator[Segment]:
        """One segment for every drawn level, without guidance, of the loss's mean over levels and latents."""
        old = self._following(chain)
        clean, trajectory = rollout.trajectory.latents[0], rollout.trajectory
        levels = self._draw(chain, generator)
        for t in levels:
            point = chain.path_point(t)
            noise = shared_noise(clean, trajectory.prompts, generator)
            noised = point.alpha * clean + point.sigma * noise
            at_level = replace(trajectory, latents=noised.expand(len(trajectory.latents), *noised.shape))
            with chain.without_guidance():
                with torch.no_grad():
                    with holding(chain.parameters, old):
                        of_old = chain.replay(at_level, t).pred_original_sample
                    of_base = chain.replay_reference(at_level, t).pred_original_sample if self.asks_base else None
                pull = partial(
                    self._cotangent,
                    advantages,
                    clean,
                    noised,
                    of_old,
                    of_base,
                    point,
                    1 / chain.prediction_sensitivity(t),
                )
                yield Segment(
                    "forward",
                    (t,),
                    None,
                    1 / len(levels),
                    into_parameters=pull,
                    from_prediction=True,
                    trajectory=at_level,
                )

    def learn(self, books: Sequence[Book]) -> None:
        """The old weights follow before the next update, when the chain is at hand."""
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        old = [weight.cpu() for weight in self._old]
        return {"old": old, "updates": self._updates, "followed": self._followed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._old = list(state["old"])
        self._updates, self._followed = state["updates"], state["followed"]

    def _following(self, chain: Chain) -> list[torch.Tensor]:
        """The old weights; the first time in an update they follow the present ones."""
        present = [parameter.detach() for parameter in chain.parameters]
        if not self._old:
            self._old = [weight.clone() for weight in present]
        self._old = [old.to(weight) for old, weight in zip(self._old, present, strict=True)]
        if self._followed < self._updates:
            decay = min(self.arguments.old_decay, self._updates * self.arguments.old_decay_growth)
            self._old = [old.lerp(weight, 1 - decay) for old, weight in zip(self._old, present, strict=True)]
            self._followed = self._updates
        return self._old

    def _draw(self, chain: Chain, generator: torch.Generator) -> list[int]:
        steps = range(1, chain.num_steps + 1)
        density = torch.tensor([chain.path_point(t).noise_share for t in steps], dtype=torch.float64)
        count = min(self.arguments.noise_levels, chain.num_steps)
        drawn = torch.multinomial(density**self.arguments.level_density, count, generator=generator)
        return sorted((1 + drawn).tolist())

    def _cotangent(
        self,
        advantages: torch.Tensor,
        clean: torch.Tensor,
        noised: torch.Tensor,
        of_old: torch.Tensor,
        of_base: torch.Tensor | None,
        point: PathPoint,
        slope: float,
        t: int,
        prediction: torch.Tensor,
        _: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Minus the loss's derivative by the prediction of x_0, (B, ...); all predictions are of x_0.

        ``o = -slope x_0 + constant``, so every difference of outputs is one of predictions.
        """
        moved, residual = -slope * (prediction - of_old), -slope * (clean - of_old)
        from_base = None if of_base is None else -slope * (prediction - of_base)
        compared = LevelOutputs(moved, residual, from_base, advantages, point.noise_share)
        pull, numbers = self._pull(compared)
        if from_base is not None:
            pull = pull - 2 * self.base_pull * from_base
            numbers = {**numbers, "base_distance": float(_mean_square(from_base).mean())}
        cotangent = -slope / clean[0].numel() * pull
        if of_base is None:
            return cotangent, numbers
        velocity, of_base = flow_velocity(noised, prediction, point), flow_velocity(noised, of_base, point)
        growth, outward = norm_excess(velocity, of_base, self.arguments.norm_margin)
        numbers = {**numbers, "velocity_growth": float(growth.mean())}
        # Less prediction of x_0 is more velocity, by (alpha + sigma) / sigma.
        return cotangent + self.arguments.norm_penalty * outward / point.noise_share, numbers


def shared_noise(clean: torch.Tensor, prompts: Sequence[Prompt], generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise like the images (B, ...), the same for neighbours with one prompt."""
    counts = [len(list(same)) for _, same in groupby(texts_of(prompts))]
    noise = torch.randn((len(counts), *clean.shape[1:]), generator=generator, dtype=clean.dtype).to(clean)
    return noise.repeat_interleave(torch.tensor(counts, device=clean.device), dim=0)


def flow_velocity(noised: torch.Tensor, prediction: torch.Tensor, point: PathPoint) -> torch.Tensor:
    """``eps - x_0`` as a prediction of x_0 implies it, (B, ...)."""
    return (noised - point.scale * prediction) / point.sigma


def norm_excess(velocity: torch.Tensor, of_base: torch.Tensor, margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Growth of the velocity's norm against the base's, (B,); and the derivative of the penalty, (B, ...).

    The penalty is ``max(0, |v| / |v_base| - 1 - margin)^2``.
    """
    norm, base_norm = velocity.flatten(1).norm(dim=1), of_base.flatten(1).norm(dim=1)
    growth = norm / base_norm - 1
    factor = 2 * (growth - margin).clamp(min=0) / (norm * base_norm)
    return growth, per_sample(factor, velocity) * velocity


@contextmanager
def holding(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, the parameters are these values; nothing is copied."""
    own = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


def _mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().flatten(1).mean(1)


def _by_its_size(values: torch.Tensor) -> torch.Tensor:
    return values / per_sample(values.abs().flatten(1).mean(1).clamp(min=SMALLEST_ERROR), values)
