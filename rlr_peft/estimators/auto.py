"""The member of the family that promises the most improvement per cost, chosen by measured gradients.

Every member weights the per-step gradients of a sample, drawn or not: ``g = sum_r w_r v_r``, where the rows v_r are the
exact pathwise gradients G_t, those with the velocity held fixed, and the score terms. Adam takes steps of about the
same length whatever the estimate, so that an update of B independent samples raises the reward in proportion to

    <gradient, E g> / sqrt(E |mean of B g|^2),

which is |gradient| for a full gradient without noise and less for one that is biased or noisy. Divided by the cost of B
samples it is the expected improvement per cost. The gradient is that of the measured samples' own mean reward: so few
do not tell the true one, which is often too small to be seen in them at all, but a member that misses theirs sample by
sample will miss it too.

Two choices are made unmeasured. Where several models share out the steps, as in Wan 2.2, three drawn steps are taken:
in races truncated gradients, which never reach the model of the noisy steps, and ``rlr`` promised more and gained less.
And a run too short to pay for a few measured samples takes the last step alone, which won or was level in races with
one model.

The batch may be chosen too. With N the noise scale, tr(covariance) / |mean|^2 of a single sample's estimate, a step of
the best length improves the reward in proportion to ``B / (B + N)`` (McCandlish et al. 2018, arXiv:1812.06162): per
cost ``1 / (B + N)``, which is nearly flat below N and halved at N. A quarter of N gives up a fifth, and the share of
noise in an update is then the same for every model, reward and method, as a learning rate wants it.

The member is chosen by calibrations, on samples that no update uses; N, which so few samples cannot tell, comes from
the gradients of past updates.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from rlr_peft.chain.adjoint import Segment
from rlr_peft.chain.steps import Chain, noisy_steps
from rlr_peft.config.methods import AutoArguments, FlowBPSparseArguments, FullBPArguments, TruncatedBPArguments
from rlr_peft.config.policy import RAMArguments
from rlr_peft.estimators.base import Book, Coverage, Estimator, RunShape
from rlr_peft.estimators.forward import ForwardEstimator
from rlr_peft.estimators.objective import Objective, Rollout
from rlr_peft.estimators.pathwise import PathwiseEstimator
from rlr_peft.estimators.rlr import STEP_COST, RLREstimator
from rlr_peft.estimators.step_gradients import (
    FIRST_PAIRS,
    GradientSketch,
    NoiseScale,
    StepGradients,
    check_gradient,
    measure_step_gradients,
)
from rlr_peft.estimators.variance import GradientMoments
from rlr_peft.estimators.zeroth_order import Perturbation

logger = logging.getLogger(__name__)

UNBIASED = "rlr"
# Samples of an update, where they are measured, as a share of the noise scale; and how fast they may grow or shrink.
BATCH_OF_NOISE_SCALE = 0.25
FASTEST_GROWTH = 2.0
# Fewer samples choose nothing.
FEWEST_CHOOSING = 4
# Draws that the moments of a member's random weights are averaged over.
WEIGHT_DRAWS = 500


@dataclass(frozen=True)
class RowWeights:
    """A member's random weights of the rows.

    Attributes:
        mean: ``E w``, (R,), float64.
        square: ``E w w^T``, (R, R).
        replays: expected steps that are replayed and pulled back, per sample.
        shared: whether all samples of an update share the draw.
    """

    mean: torch.Tensor
    square: torch.Tensor
    replays: float
    shared: bool = False

    @classmethod
    def fixed(cls, rows: torch.Tensor) -> "RowWeights":
        """Weights (R,) that are not drawn."""
        return cls(rows, torch.outer(rows, rows), float((rows != 0).sum()))

    @classmethod
    def drawn(cls, draws: torch.Tensor) -> "RowWeights":
        """Of equally likely draws (D, R), each for a whole update."""
        return cls(draws.mean(0), draws.T @ draws / len(draws), float((draws != 0).sum(1).double().mean()), shared=True)


@dataclass(frozen=True)
class Promise:
    """What a member is expected to do, relative to a full gradient without noise.

    Attributes:
        cosine: between its expectation and the full gradient.
        improvement: of an update, over the number of evaluations that it costs.
    """

    cosine: float
    improvement: float


def promise(
    moments: GradientMoments,
    weights: RowWeights,
    full: torch.Tensor,
    samples: int,
    fixed_cost: float,
) -> Promise:
    """Judges a member.

    Args:
        moments: of the rows.
        weights: of the member.
        full: weights of the rows that give the whole gradient, (R,).
        samples: B, of an update.
        fixed_cost: of a sample without replays, in denoiser evaluations.
    """

    def square(products: torch.Tensor) -> torch.Tensor:
        """Of a length: the sum over all pairs of rows."""
        return products.sum().clamp(min=1e-300)

    along = full @ moments.means @ weights.mean
    length = square(torch.outer(full, full) * moments.means)
    expected = square(torch.outer(weights.mean, weights.mean) * moments.means)
    single = square(weights.square * moments.products)
    alike = square(weights.square * moments.means) if weights.shared else expected
    of_update = (single + (samples - 1) * alike) / samples
    cost = samples * (fixed_cost + STEP_COST * weights.replays)
    return Promise(
        cosine=float((along / (length * expected).sqrt()).clamp(-1, 1)),
        improvement=float(along.clamp(min=0) / (length * of_update).sqrt() / cost),
    )


class AutoEstimator(Estimator):
    """Delegates to ``rlr`` or to the member of the pathwise family that promises more.

    A reward without gradient, of which so few samples say nothing, is left to ``ram``, which gained more than
    ``rlr`` in races.

    Args:
        rlr: the unbiased member, with its roulette.
        ram: for a reward without gradient.
        num_steps: T.
        samples: B, of an update; of one micro-batch in every process where B is measured.
        most_samples: the largest B where it is measured, in whole micro-batches; None for a B that is given.

    Attributes:
        micro_batches: as many as make up B; one until enough updates have shown how noisy they are.
    """

    uses_reward_gradient = True
    goes_back = True  # it chooses for the user
    fewest_measured = 2  # which show whether there is a gradient, and how many models

    def __init__(
        self,
        rlr: RLREstimator,
        ram: ForwardEstimator,
        num_steps: int,
        samples: int,
        most_samples: int | None = None,
    ) -> None:
        self._ram = ram
        self.micro_batches = 1
        self._samples = samples
        self._most_samples = most_samples
        self._noise_scale = NoiseScale()
        self._unchanged_since = 0
        self._sketch: GradientSketch | None = None
        drawn = PathwiseEstimator(FlowBPSparseArguments(step_density=0.0))
        full = PathwiseEstimator(FullBPArguments())
        last, quarter = (PathwiseEstimator(TruncatedBPArguments(fo_steps=k)) for k in (1, -(-num_steps // 4)))
        self._drawn, self._last = drawn.describe(), last.describe()
        self._members: dict[str, Estimator] = {UNBIASED: rlr}
        self._members |= {member.describe(): member for member in (drawn, full, last, quarter)}
        self._moments: GradientMoments | None = None
        self._promises: dict[str, Promise] = {}
        self._chosen = UNBIASED

    @classmethod
    def from_arguments(cls, arguments: AutoArguments, shape: RunShape) -> Self:
        most = arguments.calibration_samples if shape.measures_batch else None
        rlr = RLREstimator.from_arguments(arguments.rlr, shape)
        ram = ForwardEstimator(RAMArguments())
        return cls(rlr, ram, shape.num_inference_steps, shape.samples, most)

    @property
    def rlr(self) -> RLREstimator:
        """The unbiased member."""
        rlr = self._members[UNBIASED]
        assert isinstance(rlr, RLREstimator)
        return rlr

    @property
    def chosen(self) -> Estimator:
        """The member in use."""
        return self._members[self._chosen]

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        """As the member in use does."""
        return self.chosen.needs_noise

    def describe(self, has_gradient: bool | None = None) -> str:
        """The member in use and why, for logs and cards."""
        if has_gradient is False:
            return f"as the reward has no gradient, ram: {self._ram.describe(has_gradient)}"
        if not self._promises and self._chosen == self._drawn:
            return f"as several models share out the steps, {self.chosen.describe(has_gradient)}"
        if not self._promises and self._chosen == self._last:
            return f"as the run is too short to measure, {self.chosen.describe(has_gradient)}"
        if not self._promises:
            return (
                f"the first update measures which method improves the reward most for its cost; until then {UNBIASED}"
            )
        best, unbiased = self._promises[self._chosen], self._promises[UNBIASED]
        words = f"by measurement, {self.chosen.describe(has_gradient)}"
        words += f"; its cosine with the full gradient of the measured samples is {best.cosine:.2f}"
        if self._chosen == UNBIASED:
            return words
        if unbiased.improvement == 0:
            return f"{words}, and {UNBIASED} would not improve the reward on them"
        ratio = best.improvement / unbiased.improvement
        return f"{words}, and it improves the reward {ratio:.2g} times as much as {UNBIASED} for the same cost"

    def for_reward(self, has_gradient: bool) -> Estimator:
        """``ram`` for a reward without gradient."""
        return self if has_gradient else self._ram

    def compares_images(self, chain: Chain, has_gradient: bool) -> bool:
        return (self.chosen if has_gradient else self._ram).compares_images(chain, has_gradient)

    def coverage(self, chain: Chain, has_gradient: bool) -> Coverage:
        return (self.chosen if has_gradient else self._ram).coverage(chain, has_gradient)

    def segments(
        self, chain: Chain, objective: Objective, rollout: Rollout, advantages: torch.Tensor, generator: torch.Generator
    ) -> Iterator[Segment | Perturbation]:
        yield from self.chosen.segments(chain, objective, rollout, advantages, generator)

    def advantages(self, rewards: torch.Tensor, prompts: Sequence[str], group_size: int) -> torch.Tensor:
        return self.rlr.advantages(rewards, prompts, group_size)

    def wants_calibration(self, has_gradient: bool) -> bool:
        """Whether there is a choice: not with several models or in a short run, which the first samples show."""
        return has_gradient and (self._chosen == UNBIASED or bool(self._promises))

    @property
    def is_calibrated(self) -> bool:  # type: ignore[override]
        """Whether the method was chosen, in this session or before the checkpoint that was loaded."""
        return self.rlr.is_calibrated or self._chosen != UNBIASED

    def calibrate(self, chain: Chain, rollouts: Sequence[Rollout], advantages: torch.Tensor, decay: float) -> None:
        """Measures all rows on rollouts that no update uses, and chooses; nothing if these show no gradient.

        Where several models share out the steps, or samples are too few, nothing is measured.
        """
        if rollouts[0].reward_gradient is None:
            return
        if chain.trained_models > 1 or len(advantages) < FEWEST_CHOOSING:
            self._chosen = self._drawn if chain.trained_models > 1 else self._last
            return
        gradients = measure_step_gradients(
            chain, rollouts, advantages, GradientSketch(chain.parameters), with_held=True, description="Calibrating"
        )
        check_gradient(gradients, rollouts)
        self.rlr.statistics.calibrate(gradients, decay)
        newer = GradientMoments.of(rows_of(gradients))
        self._moments = newer if self._moments is None else self._moments.blend(newer, decay)
        self._choose(chain, len(gradients.advantages))

    def see_gradient(self, parameters: Sequence[torch.nn.Parameter], samples: int) -> None:
        """Measures the noise scale, and B by it."""
        if self._most_samples is None:
            return
        if self._sketch is None:
            self._sketch = GradientSketch(parameters)
        self._noise_scale.see(self._sketch([p.grad for p in parameters if p.grad is not None]), samples)
        if self._noise_scale.pairs - self._unchanged_since < FIRST_PAIRS:
            return
        noise_scale, wanted = self._noise_scale.value(), float(self._most_samples)
        if noise_scale is not None:
            wanted = min(BATCH_OF_NOISE_SCALE * noise_scale, wanted)
        per_micro_batch = samples / self.micro_batches
        wanted /= per_micro_batch
        slowest, fastest = self.micro_batches / FASTEST_GROWTH, self.micro_batches * FASTEST_GROWTH
        chosen = max(1, round(min(max(wanted, slowest), fastest)))
        if chosen != self.micro_batches:
            shown = "as no signal shows above the noise"
            if noise_scale is not None:
                shown = f"by a noise scale of {noise_scale:.2g} samples"
            logger.info("An update has %d samples from now on, %s.", round(chosen * per_micro_batch), shown)
            self.micro_batches = chosen
            self._unchanged_since = self._noise_scale.pairs
            self._share_batch()

    def learn(self, books: Sequence[Book]) -> None:
        (self._ram if books[0].reward_gradient_square is None else self.rlr).learn(books)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rlr": self.rlr.state_dict(),
            "ram": self._ram.state_dict(),
            "moments": None if self._moments is None else dict(vars(self._moments)),
            "promises": {name: dict(vars(promised)) for name, promised in self._promises.items()},
            "chosen": self._chosen,
            "micro_batches": self.micro_batches,
            "unchanged_since": self._unchanged_since,
            "noise_scale": self._noise_scale.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rlr.load_state_dict(state["rlr"])
        self._ram.load_state_dict(state["ram"])
        self._moments = None if state["moments"] is None else GradientMoments(**state["moments"])
        self._promises = {name: Promise(**promised) for name, promised in state["promises"].items()}
        self._chosen = state["chosen"]
        self.micro_batches, self._unchanged_since = state["micro_batches"], state["unchanged_since"]
        self._noise_scale.load_state_dict(state["noise_scale"])
        self._share_batch()

    def _choose(self, chain: Chain, count: int) -> None:
        """Judges the members on as many samples as were measured."""
        assert self._moments is not None  # as calibrate has just measured
        moments = self._moments.of_the_samples(count)
        full = torch.zeros(3 * chain.num_steps, dtype=torch.float64)
        full[: chain.num_steps] = 1
        self._promises = {
            name: promise(moments, weights_of(member, chain), full, self.rlr.samples, chain.num_steps)
            for name, member in self._members.items()
        }
        self._chosen = max(self._promises, key=lambda name: self._promises[name].improvement)

    def _share_batch(self) -> None:
        """The roulette's chances depend on B."""
        self.rlr.samples = self._samples * self.micro_batches


def weights_of(member: Estimator, chain: Chain) -> RowWeights:
    """Of the rows: T exact pathwise gradients, T with the velocity held fixed, T score terms.

    The member is ``rlr`` without a mixture, or a pathwise one that carries all or nothing between its steps.
    """
    num_steps = chain.num_steps
    if isinstance(member, RLREstimator):
        return _rlr_weights(member, chain)
    assert isinstance(member, PathwiseEstimator)
    generator = torch.Generator().manual_seed(0)
    is_drawn, is_held = member.settings.steps == "drawn", member.settings.carry is not None
    draws = torch.zeros(WEIGHT_DRAWS if is_drawn else 1, 3 * num_steps, dtype=torch.float64)
    for row in draws:
        chosen = member.choose(chain, generator)
        row[[num_steps * is_held + t - 1 for t in chosen.steps]] = torch.tensor(chosen.weights, dtype=torch.float64)
    return RowWeights.drawn(draws) if is_drawn else RowWeights.fixed(draws[0])


def rows_of(gradients: StepGradients) -> torch.Tensor:
    """The rows (3 T, N, d): exact pathwise gradients, those with the velocity held fixed, score terms."""
    assert gradients.pathwise is not None and gradients.held is not None, "of a reward with a gradient"
    return torch.cat([gradients.pathwise, gradients.held, gradients.half_order])


def _rlr_weights(rlr: RLREstimator, chain: Chain) -> RowWeights:
    """Pathwise gradients up to K, by roulette if it has one, and score terms on all noisy steps beyond."""
    num_steps, length = chain.num_steps, rlr.layout(chain, has_gradient=True).first_order_steps
    fixed = torch.zeros(3 * num_steps, dtype=torch.float64)
    fixed[:length] = 1
    fixed[[2 * num_steps + t - 1 for t in noisy_steps(chain) if t > length]] = 1
    weights = RowWeights.fixed(fixed)
    if not rlr.walks_by_roulette(chain, length):
        return weights
    probabilities = rlr.roulette(chain, length)
    square = weights.square.clone()
    square[:length, :length] = 1 / torch.maximum(probabilities[:, None], probabilities[None])
    return RowWeights(fixed, square, float(probabilities.sum()) + float(fixed[length:].sum()))
