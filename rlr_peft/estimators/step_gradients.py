"""Sketches of single samples' gradients through every step, and their inner products: what calibrations measure."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from rlr_peft.chain.adjoint import Segment, walk
from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.base import CoverageError
from rlr_peft.estimators.objective import Rollout
from rlr_peft.estimators.pathwise import first_order_segment


class GradientSketch:
    """A random projection of gradients to d numbers that keeps inner products; linear, the same for the same seed.

    A count sketch (Charikar, Chen, Farach-Colton 2002) adds every component, with a random sign, into one of d buckets.
    Inner products of sketches equal those of the vectors in expectation, with a standard error of about
    ``|a| |b| sqrt(2 / d)`` at the most.

    Args:
        parameters: lend the shapes and the device.
        dimension: d.
        seed: of the hashing.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], dimension: int = 4096, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = sum(parameter.numel() for parameter in parameters)
        device = parameters[0].device
        self.dimension = dimension
        self._buckets = torch.randint(dimension, (size,), generator=generator, dtype=torch.int32).to(device)
        self._signs = (2 * torch.randint(2, (size,), generator=generator, dtype=torch.int8) - 1).to(device)

    def __call__(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sketch (d,) of one tensor per parameter, on the CPU, in the gradients' precision."""
        vector = torch.cat([gradient.flatten() for gradient in gradients])
        sketch = torch.zeros(self.dimension, dtype=vector.dtype, device=vector.device)
        return sketch.index_add_(0, self._buckets, vector * self._signs).cpu()


@dataclass(frozen=True)
class StepGradients:
    """Sketches of N samples' gradients through every step, at index t - 1.

    Attributes:
        pathwise: G_t, the reward's gradient through step t, (T, N, d); None for a reward without gradient.
        scores: S_t, the gradient of ``< eps_t / sigma_t, mu_t >``, (T, N, d); zeros where a step has no noise.
        advantages: of the samples, (N,).
        has_noise: whether step t has a score term, (T,), bool.
        cotangent_squares: squared norm of the reward's derivative at the mean of every step, (T, N), float64; None for
            a reward without gradient.
        held: the same as `pathwise` with the velocity held fixed between step t and the image, (T, N, d); None where
            that was not asked for.
    """

    pathwise: torch.Tensor | None
    scores: torch.Tensor
    advantages: torch.Tensor
    has_noise: torch.Tensor
    cotangent_squares: torch.Tensor | None = None
    held: torch.Tensor | None = None

    @property
    def half_order(self) -> torch.Tensor:
        """H_t, the score-function gradients ``A S_t``, (T, N, d)."""
        return self.advantages[None, :, None] * self.scores


def measure_step_gradients(
    chain: Chain,
    rollouts: Sequence[Rollout],
    sketch: GradientSketch,
    first_order_only: bool = False,
    with_held: bool = False,
    description: str | None = None,
) -> StepGradients:
    """Replays every step of every sample once, and pulls back the reward's gradient and the noise.

    Args:
        chain: the chain.
        rollouts: of at least two samples in all.
        sketch: projects the gradients.
        first_order_only: leave the scores at zero, where only the pathwise gradients are wanted.
        with_held: measure the gradients with the velocity held fixed too, of a reward with a gradient.
        description: of the progress bar; None for no bar.

    Raises:
        ValueError: fewer than two samples.
    """
    samples = [rollout.select([i]) for rollout in rollouts for i in range(len(rollout.rewards))]
    if len(samples) < 2:
        raise ValueError(f"Expected at least 2 samples to measure a variance, got {len(samples)}.")
    num_steps = chain.num_steps
    has_noise = torch.tensor([chain.std(t) > 0 for t in range(1, num_steps + 1)])
    shape = (num_steps, len(samples), sketch.dimension)
    differentiable = samples[0].reward_gradient is not None
    pathwise, squares = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.float64)
    scores, held = torch.zeros(shape), torch.zeros(shape)
    scored = [t for t in range(1, num_steps + 1) if has_noise[t - 1] and not first_order_only]
    kept = _kept(chain)
    counted = samples if description is None else tqdm(samples, description, unit="sample", leave=False)
    for i, sample in enumerate(counted):
        if not differentiable:
            for t in scored:
                (step,) = walk(chain, sample.trajectory, Segment("score", (t,), _noise_over_std(sample, t)))
                scores[t - 1, i] = sketch(step.gradients)
            continue

        def probes(t: int, sample: Rollout = sample) -> list[torch.Tensor]:
            assert sample.reward_gradient is not None
            probing = [kept[t - 1] * sample.reward_gradient] if with_held else []
            return probing + ([_noise_over_std(sample, t)] if t in scored else [])

        for step in walk(chain, sample.trajectory, first_order_segment(sample, num_steps), probes):
            squares[step.t - 1, i] = step.cotangent_square()
            pathwise[step.t - 1, i] = sketch(step.gradients)
            probed = [sketch(gradients) for gradients in step.probed]
            if with_held:
                held[step.t - 1, i] = probed[0]
            if step.t in scored:
                scores[step.t - 1, i] = probed[-1]
    advantages = torch.cat([rollout.advantages for rollout in rollouts]).float().cpu()
    if not differentiable:
        return StepGradients(None, scores, advantages, has_noise)
    return StepGradients(pathwise, scores, advantages, has_noise, squares, held if with_held else None)


def _noise_over_std(sample: Rollout, t: int) -> torch.Tensor:
    return sample.trajectory.noise(t) / sample.trajectory.std(t)


def _kept(chain: Chain) -> list[float]:
    """What is left of the reward's gradient at the mean of step t with the velocity held fixed, at index t - 1."""
    kept = [1.0]
    for t in range(1, chain.num_steps):
        kept.append(kept[-1] * chain.input_sensitivity(t))
    return kept


def check_gradient(gradients: StepGradients, rollouts: Sequence[Rollout]) -> None:
    """A gradient that is zero everywhere has no variance, and would be chosen for it."""
    rewards = torch.cat([rollout.rewards for rollout in rollouts])
    if gradients.pathwise is not None and not gradients.pathwise.any() and rewards.min() < rewards.max():
        raise CoverageError(
            f"Expected a reward whose gradient is not zero on all {len(rewards)} samples, got zeros although the "
            "rewards differ: it is a step function, rounded or saturated. Declare it with `differentiable = False` on "
            "the callable, or smooth it."
        )


def step_energies(gradients: StepGradients) -> torch.Tensor:
    """Mean squared norm of the samples' gradients at index t - 1, (T,), float64.

    The pathwise gradients where the reward has one: score terms are mostly noise, largest where steps are quietest.
    """
    vectors = gradients.half_order if gradients.pathwise is None else gradients.pathwise
    return vectors.double().square().sum(2).mean(1)


@dataclass(frozen=True)
class GradientMoments:
    """Inner products of the rows of per-step gradients, (R, R), float64.

    Attributes:
        products: ``E <v_r, v_s>`` of a single sample.
        means: ``<E v_r, E v_s>``, estimated without bias from pairs of different samples.
    """

    products: torch.Tensor
    means: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> "GradientMoments":
        """Of the rows of N samples, (R, N, d)."""
        count = rows.shape[1]
        rows = rows.double()
        products = torch.einsum("rnd,snd->rs", rows, rows) / count
        total = rows.sum(1)
        return cls(products, (total @ total.T - count * products) / (count * (count - 1)))

    def of_the_samples(self, count: int) -> "GradientMoments":
        """As if the ``count`` samples that were measured were all there are: ``means`` of their own mean rows.

        Those lie between noise and truth: where few samples show no signal, rows still count as alike that are alike
        in every sample. They are an inner product, with no negative lengths.
        """
        return GradientMoments(self.products, self.means + (self.products - self.means) / count)

    def first(self, count: int) -> "GradientMoments":
        """Of the first rows."""
        return GradientMoments(self.products[:count, :count], self.means[:count, :count])

    def blend(self, newer: "GradientMoments", decay: float) -> "GradientMoments":
        """Running mean: ``decay`` times this plus ``1 - decay`` times the newer measurement."""
        return GradientMoments(
            decay * self.products + (1 - decay) * newer.products, decay * self.means + (1 - decay) * newer.means
        )
