"""Sketches of gradients: of single samples through every step, what calibrations measure; and of whole updates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from rlr_peft.chain.adjoint import Segment, walk
from rlr_peft.chain.steps import Chain
from rlr_peft.estimators.base import FIRST_ORDER, CoverageError
from rlr_peft.estimators.objective import Rollout

# Of the gradients of single samples that are there at a time, for each of up to three cotangents: 256 MiB in float32.
MOST_NUMBERS = 2**26


class GradientSketch:
    """A random projection of gradients to d numbers that keeps inner products; linear, the same for the same seed.

    A count sketch (Charikar, Chen, Farach-Colton 2002) adds every component, with a random sign, into one of d buckets.
    Inner products of sketches equal those of the vectors in expectation, with a standard error of about
    ``|a| |b| sqrt(2 / d)`` at the most.

    Args:
        parameters: lend the shapes and the device.
        dimension: d.
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
        return self.of_samples([gradient[None] for gradient in gradients])[0]

    def of_samples(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sketches (N, d) of N samples' gradients, (N, ...) for every parameter."""
        vectors = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        sketches = torch.zeros(len(vectors), self.dimension, dtype=vectors.dtype, device=vectors.device)
        return sketches.index_add_(1, self._buckets, vectors * self._signs).cpu()


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
    advantages: torch.Tensor,
    sketch: GradientSketch,
    first_order_only: bool = False,
    with_held: bool = False,
    description: str | None = None,
) -> StepGradients:
    """Replays every step of every sample once, and pulls back the reward's gradient and the noise.

    Args:
        rollouts: of at least two samples in all.
        advantages: of all samples, (N,).
        first_order_only: leave the scores at zero, where only the pathwise gradients are wanted.
        with_held: measure the gradients with the velocity held fixed too, of a reward with a gradient.
        description: of the progress bar; None for no bar.

    Raises:
        ValueError: fewer than two samples.
    """
    count = sum(len(rollout.rewards) for rollout in rollouts)
    if count < 2:
        raise ValueError(f"Expected at least 2 samples to measure a variance, got {count}.")
    measured = _Measured(chain, count, sketch.dimension, first_order_only, with_held)
    with tqdm(total=count, desc=description, unit="sample", leave=False, disable=description is None) as bar:
        for part in _parts(chain, rollouts):
            separated, size = chain.separate_samples(len(part.rewards)), len(part.rewards)
            if separated is not None:
                with separated:
                    measured.add(part, sketch.of_samples)
                bar.update(size)
                continue
            for i in range(size):
                measured.add(part.select([i]), lambda gradients: sketch(gradients)[None])
                bar.update()
    advantages = advantages.float().cpu()
    if rollouts[0].reward_gradient is None:
        return StepGradients(None, measured.scores, advantages, measured.has_noise)
    return StepGradients(
        measured.pathwise,
        measured.scores,
        advantages,
        measured.has_noise,
        measured.cotangent_squares,
        measured.held if with_held else None,
    )


def _parts(chain: Chain, rollouts: Sequence[Rollout]) -> Iterator[Rollout]:
    """The rollouts, in parts of which every sample's gradient finds room."""
    size = max(1, MOST_NUMBERS // sum(parameter.numel() for parameter in chain.parameters))
    for rollout in rollouts:
        samples = list(range(len(rollout.rewards)))
        if len(samples) <= size:
            yield rollout
        else:
            yield from (rollout.select(samples[i : i + size]) for i in range(0, len(samples), size))


class _Measured:
    """What becomes of the samples, part by part: the fields of ``StepGradients``."""

    def __init__(self, chain: Chain, count: int, dimension: int, first_order_only: bool, with_held: bool) -> None:
        steps = range(1, chain.num_steps + 1)
        shape = (chain.num_steps, count, dimension)
        self.pathwise, self.scores, self.held = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        self.cotangent_squares = torch.zeros(shape[:2], dtype=torch.float64)
        self.has_noise = torch.tensor([chain.std(t) > 0 for t in steps])
        self._scored = [t for t in steps if self.has_noise[t - 1] and not first_order_only]
        self._kept = _kept(chain) if with_held else []
        self._chain, self._added = chain, 0

    def add(self, batch: Rollout, sketched: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
        """Measures the next samples; ``sketched`` makes sketches (n, d) of their gradients."""
        rows = slice(self._added, self._added + len(batch.rewards))
        self._added = rows.stop
        if batch.reward_gradient is None:
            for t in self._scored:
                (step,) = walk(self._chain, batch.trajectory, Segment("score", (t,), _noise_over_std(batch, t)))
                self.scores[t - 1, rows] = sketched(step.gradients)
            return
        segment = Segment(FIRST_ORDER, range(1, self._chain.num_steps + 1), batch.reward_gradient)
        for step in walk(self._chain, batch.trajectory, segment, partial(self._probes, batch)):
            assert step.cotangent is not None  # as the segment has one
            self.cotangent_squares[step.t - 1, rows] = step.cotangent.double().square().flatten(1).sum(1).cpu()
            self.pathwise[step.t - 1, rows] = sketched(step.gradients)
            probed = [sketched(gradients) for gradients in step.probed]
            if self._kept:
                self.held[step.t - 1, rows] = probed[0]
            if step.t in self._scored:
                self.scores[step.t - 1, rows] = probed[-1]

    def _probes(self, batch: Rollout, t: int) -> list[torch.Tensor]:
        assert batch.reward_gradient is not None  # where there are probes
        held = [self._kept[t - 1] * batch.reward_gradient] if self._kept else []
        return held + ([_noise_over_std(batch, t)] if t in self._scored else [])


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


# Weight of the past in the running means, and how many pairs of neighbours the first answer takes.
DECAY = 0.9
FIRST_PAIRS = 8


class NoiseScale:
    """The gradient noise scale of the estimate in use, from the gradients of successive updates: it costs nothing.

    With g the mean over the B samples of an update, ``E |g|^2 = |E g|^2 + tr(S) / B`` for the covariance S of a single
    sample's estimate, and neighbouring updates, whose samples are independent and whose weights hardly differ, show
    ``E <g, g'> = |E g|^2``. Their ratio tr(S) / |E g|^2 is the noise scale N (McCandlish et al. 2018, 1812.06162).

    Attributes:
        pairs: of neighbouring updates that were seen.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self._signal = self._noise = 0.0
        self._last: torch.Tensor | None = None
        self._last_samples = 0

    def see(self, sketch: torch.Tensor, samples: int) -> None:
        """Learns from an update's mean gradient, given as a sketch (d,) that keeps inner products.

        Args:
            samples: B of this update.
        """
        sketch = sketch.double()
        if self._last is not None:
            signal = float(sketch @ self._last)
            noises = (
                (float(sketch @ sketch) - signal) * samples,
                (float(self._last @ self._last) - signal) * self._last_samples,
            )
            weight = max(1 - DECAY, 1 / (self.pairs + 1))
            self._signal += weight * (signal - self._signal)
            self._noise += weight * (sum(noises) / 2 - self._noise)
            self.pairs += 1
        self._last, self._last_samples = sketch, samples

    def value(self) -> float | None:
        """N in samples; None while no signal shows above the noise."""
        return max(0.0, self._noise) / self._signal if self._signal > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """The running means and the last gradient's sketch."""
        return {
            "pairs": self.pairs,
            "signal": self._signal,
            "noise": self._noise,
            "last": self._last,
            "last_samples": self._last_samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.pairs, self._signal, self._noise = state["pairs"], state["signal"], state["noise"]
        self._last, self._last_samples = state["last"], state["last_samples"]
