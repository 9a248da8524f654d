"""How noisy the terms of every step are, and which K that makes best.

Pathwise gradients grow towards the noise, because the chain amplifies; score terms shrink, because the steps are
noisier there. Where they cross depends on the model, T and the reward, so it is measured, in two parts:

- a calibration replays the steps of a few samples and keeps sketches of their gradients: they show every step's GAIN,
  the variance of what comes out for the size of what is pulled back, which hardly differs between samples;
- every update shows, for free, the SIZES of what is pulled back. These do differ: where early steps are chaotic, one
  sample in a hundred has a cotangent larger than all others by orders of magnitude and makes up the variance, and where
  a reward is nearly satisfied, few samples have an advantage at all. A calibration mostly misses them.

Everything comes from past updates and from calibrations, so that what it chooses biases no estimate.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rlr_peft.estimators.base import FIRST_ORDER, MIXED_ORDER, Book
from rlr_peft.estimators.half_order import HALF_ORDER, StateBaseline
from rlr_peft.estimators.step_gradients import StepGradients, step_energies

# A weight this close to 0 or 1 is not worth a second backward pass.
NEGLIGIBLE_WEIGHT = 0.01

# A K below T must promise at least this factor: from few samples both sums are rough, a score term that was taken for
# quiet costs far more than a pathwise one that was, and score terms grow with rewards that the samples did not show.
WORTH_LEAVING_FULL = 2.0

NORM_DECAY = 0.9
# Rare samples must not be forgotten soon, the rewards of much weaker weights should be.
SIZE_DECAY = 0.99


@dataclass(frozen=True)
class StepVariances:
    """Variances (traces of covariances) of a single sample's gradient through every step, at index t - 1.

    Attributes:
        first_order: V_G(t), (T,), float64; None without a reward gradient.
        half_order: V_H(t), (T,), float64; it says nothing where a step has no noise.
        has_noise: whether step t has a score term, (T,), bool.
    """

    first_order: torch.Tensor | None
    half_order: torch.Tensor
    has_noise: torch.Tensor


def step_variances(gradients: StepGradients) -> StepVariances:
    """The variances that the samples of a calibration show by themselves."""
    return StepVariances(
        first_order=None if gradients.pathwise is None else _by_step(gradients.pathwise),
        half_order=_by_step(gradients.half_order),
        has_noise=gradients.has_noise,
    )


def variance_and_error(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Trace of the covariance of the rows of (N, d), and its standard error; both float64.

    Heavy tails show in the error: one sample that makes up all of the variance gives an error as large as the variance.
    """
    count = len(samples)
    squares = (samples.double() - samples.double().mean(0)).square().sum(1) * count / (count - 1)
    return squares.mean(), squares.std() / count**0.5


def _by_step(vectors: torch.Tensor) -> torch.Tensor:
    return torch.stack([variance_and_error(step)[0] for step in vectors])


def best_first_order_steps(variances: StepVariances, worth_leaving_full: float = WORTH_LEAVING_FULL) -> int:
    """The K in 0..T with the smallest sum of variances if steps 1..K are first order and the rest half order.

    No step without noise is among the rest, and without a reward gradient K is 0.

    Every step costs one denoiser evaluation and one backward pass, whatever its term, so variance alone decides. The
    whole estimate's variance would be the better criterion if it were known: the terms of different steps are
    correlated. Measured on few samples it is noisier than the two sums, whose errors go together, and chose worse.

    Args:
        worth_leaving_full: factor by which a smaller K must lower the sum.

    Returns:
        K; T unless a smaller K lowers the sum by that factor.
    """
    if variances.first_order is None:
        return 0
    noiseless = (~variances.has_noise).nonzero()
    least = int(noiseless.max()) + 1 if len(noiseless) else 0
    zero = torch.zeros(1, dtype=torch.float64)
    pathwise = torch.cat([zero, variances.first_order.double().cumsum(0)])
    score = torch.cat([variances.half_order.double().flip(0).cumsum(0).flip(0), zero])
    sums = (pathwise + score)[least:]
    best = int(sums.argmin())
    return least + best if worth_leaving_full * sums[best] < sums[-1] else len(variances.first_order)


def inverse_variance_weights(variances: StepVariances) -> torch.Tensor:
    """``w_t = V_H / (V_G + V_H)``, the weight of the pathwise term of every step; ``1 - w_t`` is the score term's.

    Args:
        variances: of a reward with a gradient.

    Returns:
        (T,), float64, in [0, 1]: all the weight is the pathwise term's where a step has no noise, and weights next to 0
        or 1 are rounded.
    """
    assert variances.first_order is not None  # as the reward has a gradient
    total = (variances.first_order + variances.half_order).clamp(min=1e-300)
    weights = torch.where(variances.has_noise, variances.half_order / total, 1.0).double()
    weights[weights < NEGLIGIBLE_WEIGHT] = 0.0
    weights[weights > 1 - NEGLIGIBLE_WEIGHT] = 1.0
    return weights


@dataclass
class SignalSizes:
    """How large advantages and pathwise cotangents are: sums over samples.

    Attributes:
        samples: how many.
        advantages: of squared advantages.
        cotangents: of the squared norms of the reward's derivative at the mean of step t, at index t - 1, as far as the
            samples were walked.
        first_cotangents: the same at step 1, of those samples that were walked as far as step t.
    """

    samples: float = 0.0
    advantages: float = 0.0
    cotangents: list[float] = field(default_factory=list)
    first_cotangents: list[float] = field(default_factory=list)

    @classmethod
    def of_walk(cls, advantages: torch.Tensor, cotangents: Sequence[float]) -> "SignalSizes":
        """Of samples with these advantages (B,) that were walked together; summed squares from step 1 on."""
        return cls(
            samples=len(advantages),
            advantages=float(advantages.double().square().sum()),
            cotangents=list(cotangents),
            first_cotangents=list(cotangents[:1]) * len(cotangents),
        )

    @classmethod
    def of_calibration(cls, gradients: StepGradients) -> "SignalSizes":
        """Of the samples of a calibration."""
        squares = gradients.cotangent_squares
        return cls.of_walk(gradients.advantages, [] if squares is None else squares.sum(1).tolist())

    @classmethod
    def of_book(cls, book: Book) -> "SignalSizes":
        """Of a micro-batch; without a pathwise term its reward gradient alone, the cotangent of step 1, is known."""
        squares: Sequence[float] = () if book.reward_gradient_square is None else (book.reward_gradient_square,)
        for booking in book.bookings:
            if booking.term in (FIRST_ORDER, MIXED_ORDER):
                squares = booking.cotangent_squares
        return cls.of_walk(torch.tensor(book.advantages, dtype=torch.float64), squares)

    def blend(self, newer: Iterable["SignalSizes"], decay: float) -> "SignalSizes":
        """``decay`` times this plus all of the newer ones, whose walks may differ in length."""
        blended = SignalSizes(
            decay * self.samples,
            decay * self.advantages,
            [decay * square for square in self.cotangents],
            [decay * square for square in self.first_cotangents],
        )
        for sizes in newer:
            blended.samples += sizes.samples
            blended.advantages += sizes.advantages
            _add(blended.cotangents, sizes.cotangents)
            _add(blended.first_cotangents, sizes.first_cotangents)
        return blended

    def mean_squared_advantage(self) -> float:
        """``E A^2``."""
        return self.advantages / self.samples

    def mean_squared_cotangents(self) -> torch.Tensor:
        """``E |c_t|^2`` at index t - 1, float64, of the steps that any sample was walked to.

        ``E |c_1|^2`` of all samples times the amplification ``E |c_t|^2 / E |c_1|^2`` of those that were walked: steps
        beyond the present K keep their place while the reward, and with it all cotangents, changes.
        """
        first = self.cotangents[0] / self.samples if self.cotangents else 0.0
        known = [
            first * square / first_square if first_square > 0 else 0.0
            for square, first_square in zip(self.cotangents, self.first_cotangents, strict=True)
        ]
        return torch.tensor(known, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {**vars(self), "cotangents": list(self.cotangents), "first_cotangents": list(self.first_cotangents)}


def _add(sums: list[float], more: list[float]) -> None:
    sums += [0.0] * (len(more) - len(sums))
    for i, value in enumerate(more):
        sums[i] += value


@dataclass(frozen=True)
class StepGains:
    """What a calibration says of the steps themselves, all (T,), at index t - 1.

    Attributes:
        scores: ``E |S_t|^2``, float64.
        has_noise: whether step t has a score term, bool.
        first_order: V_G(t) on the calibration's own samples, float64; None without a reward gradient.
        cotangents: ``E |c_t|^2`` on the same samples, so that ``first_order / cotangents`` is the gain of a pathwise
            gradient; None without a reward gradient.
    """

    scores: torch.Tensor
    has_noise: torch.Tensor
    first_order: torch.Tensor | None = None
    cotangents: torch.Tensor | None = None

    @classmethod
    def of(cls, gradients: StepGradients) -> "StepGains":
        """The gains that N samples show."""
        squares = gradients.scores.double().square().sum(2).mean(1)
        if gradients.pathwise is None or gradients.cotangent_squares is None:
            return cls(squares, gradients.has_noise)
        cotangents = gradients.cotangent_squares.mean(1)
        return cls(squares, gradients.has_noise, _by_step(gradients.pathwise), cotangents)

    def blend(self, newer: "StepGains", decay: float) -> "StepGains":
        """Running mean: ``decay`` times this plus ``1 - decay`` times the newer measurement."""

        def mean(older: torch.Tensor | None, newest: torch.Tensor | None) -> torch.Tensor | None:
            return newest if older is None or newest is None else decay * older + (1 - decay) * newest

        scores = decay * self.scores + (1 - decay) * newer.scores
        first_order, cotangents = mean(self.first_order, newer.first_order), mean(self.cotangents, newer.cotangents)
        return StepGains(scores, newer.has_noise, first_order, cotangents)

    def variances(self, sizes: SignalSizes) -> StepVariances:
        """``V_G(t) = gain E |c_t|^2`` and ``V_H(t) = E A^2 E |S_t|^2``, taking size and gain as independent."""
        half_order = self.scores * sizes.mean_squared_advantage()
        if self.first_order is None or self.cotangents is None:
            return StepVariances(None, half_order, self.has_noise)
        seen = sizes.mean_squared_cotangents()
        scale = torch.ones_like(self.scores)  # steps that no walk has reached keep the calibration's own variance
        own = self.cotangents[: len(seen)]
        scale[: len(seen)] = torch.where(own > 0, seen / own, 1.0)
        return StepVariances(self.first_order * scale, half_order, self.has_noise)


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


class StepStatistics:
    """The running statistics of an estimator's steps, from past updates and calibrations only.

    Args:
        state_baseline: whether there is a state baseline to learn.

    Attributes:
        variances: of the terms, which choose K; None before the first calibration.
        energies: gradient energies of the steps, (T,), which choose the window; None before the first calibration.
        moments: of the pathwise gradients, (T, T), which choose the roulette's chances; None before the first
            calibration and without a reward gradient.
        block_norms: gradient norm of half-order blocks by first step.
        state_baseline: None without one.
    """

    def __init__(self, state_baseline: bool = False) -> None:
        self.variances: StepVariances | None = None
        self.energies: torch.Tensor | None = None
        self.moments: GradientMoments | None = None
        self.block_norms: dict[int, float] = {}
        self.state_baseline = StateBaseline() if state_baseline else None
        self._gains: StepGains | None = None
        self._sizes = SignalSizes()

    def calibrate(self, gradients: StepGradients, decay: float) -> None:
        """Blends what a calibration measured into the running statistics; ``decay`` is the weight of the past."""
        measured = StepGains.of(gradients)
        self._gains = measured if self._gains is None else self._gains.blend(measured, decay)
        energies = step_energies(gradients)
        self.energies = energies if self.energies is None else decay * self.energies + (1 - decay) * energies
        if gradients.pathwise is not None:
            moments = GradientMoments.of(gradients.pathwise)
            self.moments = moments if self.moments is None else self.moments.blend(moments, decay)
        self._see([SignalSizes.of_calibration(gradients)])

    def tail(self, choice: Literal["crossing", "inverse-variance"]) -> tuple[int, torch.Tensor | None]:
        """K, and with inverse variances the weights of the pathwise terms of steps 1..K, (K,); None where all are 1."""
        if self.variances is None:
            raise RuntimeError("Expected calibrate() before the first update with first_order_steps='auto'.")
        if choice == "crossing":
            return best_first_order_steps(self.variances), None
        weights = inverse_variance_weights(self.variances)
        pathwise = weights.nonzero()
        length = int(pathwise.max()) + 1 if len(pathwise) else 0
        return length, None if bool((weights[:length] == 1).all()) else weights[:length]

    def learn(self, books: Sequence[Book]) -> None:
        """Blends what a finished update showed into the running statistics."""
        by_step: defaultdict[int, list[float]] = defaultdict(list)
        blocks = [(book, booking) for book in books for booking in book.bookings if booking.term == HALF_ORDER]
        for book, block in blocks:
            norm = block.norm / len(book.rewards) / block.weight if block.weight else 0.0
            by_step[block.steps[0]].append(norm)
        for first_step, norms in by_step.items():
            newer = sum(norms) / len(norms)
            older = self.block_norms.get(first_step, newer)
            self.block_norms[first_step] = NORM_DECAY * older + (1 - NORM_DECAY) * newer
        if self.state_baseline is not None:
            self.state_baseline.learn(block.note for _, block in blocks)
        if self._gains is not None:
            self._see(SignalSizes.of_book(book) for book in books)

    def state_dict(self) -> dict[str, Any]:
        """The statistics, of plain types and tensors."""
        return {
            "gains": None if self._gains is None else dict(vars(self._gains)),
            "energies": self.energies,
            "moments": None if self.moments is None else dict(vars(self.moments)),
            "sizes": self._sizes.state_dict(),
            "block_norms": dict(self.block_norms),
            "state_baseline": None if self.state_baseline is None else self.state_baseline.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.energies = state["energies"]
        self.moments = None if state["moments"] is None else GradientMoments(**state["moments"])
        self._sizes = SignalSizes(**state["sizes"])
        if state["gains"] is not None:
            self._gains = StepGains(**state["gains"])
            self.variances = self._gains.variances(self._sizes)
        self.block_norms = dict(state["block_norms"])
        if self.state_baseline is not None and state["state_baseline"] is not None:
            self.state_baseline.load_state_dict(state["state_baseline"])

    def _see(self, sizes: Iterable[SignalSizes]) -> None:
        """Learns from the samples of one update or calibration how large signals are."""
        self._sizes = self._sizes.blend(sizes, SIZE_DECAY)
        if self._gains is not None:
            self.variances = self._gains.variances(self._sizes)
