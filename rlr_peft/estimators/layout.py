"""Which term covers which step of the chain, with which expected weight, and why where it is not 1.

Steps are covered by the pathwise tail (FO), half-order blocks (HO), a black-box tail or the zeroth order (ZO); blocks
may be drawn, and are then weighted so that every step counts as often as it should in expectation.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from rlr_peft.chain.steps import Chain
from rlr_peft.config.estimator import CalibratedArguments, ThreeOrdersArguments
from rlr_peft.estimators.base import Coverage, CoverageError, RunShape
from rlr_peft.estimators.half_order import (
    DEFENSIVE_SHARE,
    HalfOrder,
    draw,
    draw_probabilities,
    expected_draws,
    free_blocks,
    half_order_length,
    tiles,
)
from rlr_peft.estimators.zeroth_order import ZerothOrder
from rlr_peft.reports import last_steps

TRUNCATED = "left out because the gradient is truncated"
NEEDS_NOISE = "left out because a score term needs noise there"
OUTSIDE_WINDOW = "left out, outside the chosen window"
COEFFICIENTS = "given another weight than 1 by the chosen coefficients"


@dataclass(frozen=True)
class Coefficients:
    """Factor of each term; anything but 1 is a choice of bias.

    Attributes:
        first_order: of the pathwise gradient.
        half_order: of the score terms, those of the black-box tail among them.
        zeroth_order: of the perturbation term.
    """

    first_order: float = 1.0
    half_order: float = 1.0
    zeroth_order: float = 1.0


@dataclass(frozen=True)
class RLRSettings:
    """What the estimator is made of.

    Attributes:
        first_order_steps: K; "auto" for the measured choice.
        half_order: blocks beyond K; None leaves them to the zeroth order or uncovered.
        zeroth_order: covers what the other terms leave over; None for nothing.
        black_box_steps: steps 1..n that get black-box tail terms when the reward has no gradient.
        step_choice: what "auto" measures: one K, or a weight for every step that mixes both terms.
        state_baseline: take the reward of the predicted image off the advantages of the score terms.
        coefficients: factor of each term.
        roulette: walk every sample back a random number of the K steps, weighted 1 / q.
    """

    first_order_steps: int | Literal["auto"] = "auto"
    half_order: HalfOrder | None = HalfOrder(length=1, blocks="all")
    zeroth_order: ZerothOrder | None = None
    black_box_steps: int = 0
    step_choice: Literal["crossing", "inverse-variance"] = "crossing"
    state_baseline: bool = False
    coefficients: Coefficients = Coefficients()
    roulette: bool = False

    @property
    def measures_steps(self) -> bool:
        """Whether K, the mixture or the roulette's chances are chosen by measurement."""
        return self.first_order_steps == "auto" or (self.roulette and self.first_order_steps > 1)

    @property
    def measures_window(self) -> bool:
        """Whether the window of the half-order starts is chosen by measurement."""
        return self.half_order is not None and bool(self.half_order.stage_windows)

    def describe(self, has_gradient: bool | None = None) -> str:
        """The terms in words, for logs and cards; `has_gradient` is the reward's, None where that is not known."""
        terms = []
        if has_gradient is not False and self.first_order_steps != 0:
            terms.append(self._describe_first_order())
        if not has_gradient and self.black_box_steps > 0:
            mirrored = f"antithetic noise on {last_steps(self.black_box_steps)}"
            terms = [f"{terms[0]} ({mirrored} if the reward has no gradient)" if terms else mirrored]
        if self.half_order is not None:
            baseline = " and a state baseline" if self.state_baseline else ""
            terms.append(self.half_order.describe(alone=not terms) + baseline)
        if self.zeroth_order is not None:
            terms.append(f"{self.zeroth_order.form} zeroth order with s = {self.zeroth_order.scale:g} on the rest")
        if self.coefficients != Coefficients():
            c = self.coefficients
            terms.append(f"coefficients {c.first_order:g}, {c.half_order:g}, {c.zeroth_order:g} of the three orders")
        return "; ".join(terms)

    def _describe_first_order(self) -> str:
        if self.step_choice == "inverse-variance":
            return "backpropagation and score terms mixed at every step by their measured variances"
        steps = self.first_order_steps
        which = "the last K steps, K measured" if steps == "auto" else last_steps(steps)
        walked = ", of each sample through a random number of them, weighted to stay unbiased" if self.roulette else ""
        return f"backpropagation through {which}{walked}"


def settings_from_arguments(arguments: CalibratedArguments, shape: RunShape) -> RLRSettings:
    """The terms of a method of the RLR family.

    Raises:
        ValueError: a budget that does not allow a block of one step, or one that cannot decide the length.
    """
    if isinstance(arguments, ThreeOrdersArguments):
        return _three_orders(arguments, shape)
    return RLRSettings(
        first_order_steps=0,
        half_order=HalfOrder.from_arguments(arguments, shape),
        black_box_steps=_black_box_steps(arguments, shape.num_inference_steps),
        state_baseline=arguments.state_baseline,
        coefficients=Coefficients(half_order=arguments.ho_coefficient),
    )


def _three_orders(arguments: ThreeOrdersArguments, shape: RunShape) -> RLRSettings:
    half_order = None
    if arguments.ho_blocks != 0:
        length = half_order_length(arguments, shape.num_inference_steps)
        half_order = HalfOrder.from_arguments(arguments, shape, length)
    perturbed = ZerothOrder(arguments.zo, arguments.zo_scale, arguments.zo_samples) if arguments.zo != "none" else None
    return RLRSettings(
        first_order_steps=arguments.fo_steps,
        roulette=arguments.fo_roulette,
        half_order=half_order,
        zeroth_order=perturbed,
        black_box_steps=_black_box_steps(arguments, shape.num_inference_steps),
        step_choice=arguments.step_choice,
        state_baseline=arguments.state_baseline,
        coefficients=Coefficients(arguments.fo_coefficient, arguments.ho_coefficient, arguments.zo_coefficient),
    )


def _black_box_steps(arguments: CalibratedArguments, num_inference_steps: int) -> int:
    """Mirroring steps 1..n costs n (n - 1) / 2 evaluations; n = sqrt(6 T) spends 3 T, as much as the rest about.

    Measured on tiny-shapes (docs/estimators_measured.md): variance x cost is flat around this n.
    """
    if arguments.black_box_steps == "auto":
        return min(num_inference_steps, round(math.sqrt(6 * num_inference_steps)))
    return arguments.black_box_steps


@dataclass(frozen=True)
class Layout:
    """Which term covers which step, for one K.

    Attributes:
        first_order_steps: K; 0 for none.
        mixture: weight of the pathwise term of steps 1..K, (K,), the score term's being the rest; None for 1.
        black_box_steps: steps with a black-box tail term.
        blocks: half-order blocks that all are used, or candidates that are drawn from.
        weights: of the blocks, where they are used.
        probabilities: of every block in a single draw, (len(blocks),); None if all are used.
        num_draws: how many are drawn.
        left: steps that the zeroth order covers where no drawn block does.
        coverage: expected weight of every step.
    """

    first_order_steps: int
    mixture: torch.Tensor | None
    black_box_steps: list[int]
    blocks: list[range]
    weights: list[float]
    probabilities: torch.Tensor | None
    num_draws: int
    left: list[int]
    coverage: Coverage

    @property
    def uses_advantages(self) -> bool:
        """Whether there are other terms than first order."""
        return self.mixture is not None or bool(self.black_box_steps or self.blocks or self.left)

    def draw(self, generator: torch.Generator) -> tuple[list[tuple[range, float]], list[int]]:
        """The blocks of one micro-batch with their weights, and the steps that are left to the zeroth order."""
        if self.probabilities is None:
            return list(zip(self.blocks, self.weights, strict=True)), self.left
        chosen = [(self.blocks[i], self.weights[i]) for i in draw(self.probabilities, self.num_draws, generator)]
        return chosen, [t for t in self.left if not any(t in block for block, _ in chosen)]


class _Weights:
    """Adds up the expected weight of every step, and keeps the reason of one that is not 1."""

    def __init__(self, num_steps: int) -> None:
        self.values = torch.zeros(num_steps, dtype=torch.float64)
        self.reasons: dict[int, str] = {}

    def cover(self, steps: Iterable[int], weight: float, reason: str | None) -> None:
        for t in steps:
            self.values[t - 1] += weight
            if reason is not None:
                self.reasons[t] = reason

    def coverage(self, smoothing: float | None) -> Coverage:
        off = [t for t, weight in enumerate(self.values.tolist(), start=1) if abs(weight - 1) > 1e-9]
        return Coverage(self.values, {t: self.reasons[t] for t in off if t in self.reasons}, smoothing)


def lay_out(
    settings: RLRSettings,
    chain: Chain,
    *,
    first_order_steps: int,
    has_gradient: bool,
    block_norms: Mapping[int, float] | None = None,
    mixture: torch.Tensor | None = None,
) -> Layout:
    """Decides which term covers which step, and checks the coverage.

    Args:
        settings: the terms; a measured window has been filled in.
        first_order_steps: K; ignored for a reward without gradient.
        block_norms: running gradient norm by first step of a block.
        mixture: weight of the pathwise term of steps 1..K, (K,); None for 1.

    Raises:
        CoverageError: there is no term for this reward, or a step is not covered as it should be.
    """
    num_steps, c = chain.num_steps, settings.coefficients
    tail = range(1, first_order_steps + 1) if has_gradient else range(0)
    mirrored = range(0) if has_gradient else range(1, min(settings.black_box_steps, num_steps) + 1)
    black_box = [t for t in mirrored if chain.std(t) > 0]
    weights = _Weights(num_steps)
    for t in range(1, num_steps + 1):
        weights.cover([t], 0.0, _why_left_out(settings, chain, t))
    for t in tail:
        share = 1.0 if mixture is None else float(mixture[t - 1])
        weights.cover([t], share * c.first_order + (1 - share) * c.half_order, COEFFICIENTS)
    weights.cover(black_box, c.half_order, COEFFICIENTS)
    left = [t for t in range(1, num_steps + 1) if t not in tail and t not in black_box]
    blocks, norms = _candidates(settings, chain, max(len(tail), len(mirrored))), block_norms or {}
    if settings.zeroth_order is None:
        left = []
        drawing = _cover_by_tiles(settings, blocks, norms, weights)
    else:
        drawing = _cover_by_one_block(settings, blocks, norms, left, weights)
    if not (tail or black_box or blocks or left):
        raise CoverageError(f"Expected an estimator with a term for this reward, got none: {_why_none(settings)}")
    # Blocks are all as long, so that the first tells whether one leaves anything to the zeroth order.
    is_smoothed = bool(set(left) - {t for block in blocks[:1] for t in block})
    smoothing = settings.zeroth_order.scale if settings.zeroth_order is not None and is_smoothed else None
    coverage = weights.coverage(smoothing)
    coverage.check()
    return Layout(len(tail), mixture if tail else None, black_box, blocks, *drawing, left, coverage)


def _cover_by_tiles(
    settings: RLRSettings, blocks: list[range], block_norms: Mapping[int, float], weights: _Weights
) -> tuple[list[float], torch.Tensor | None, int]:
    """All blocks with weight 1, or M drawn ones with weight 1 / q: weights, probabilities, number of draws."""
    half_order, coefficient = settings.half_order, settings.coefficients.half_order
    probabilities, num_draws, expectations = None, 0, [1.0] * len(blocks)
    if half_order is not None and half_order.blocks != "all" and blocks:
        num_draws = half_order.blocks
        probabilities = draw_probabilities(blocks, half_order, block_norms, DEFENSIVE_SHARE)
        expectations = expected_draws(probabilities, num_draws).tolist()
    block_weights = [coefficient / chance if chance > 0 else 0.0 for chance in expectations]
    for block, chance, weight in zip(blocks, expectations, block_weights, strict=True):
        if chance > 0:
            weights.cover(block, chance * weight, COEFFICIENTS)
    return block_weights, probabilities, num_draws


def _cover_by_one_block(
    settings: RLRSettings, blocks: list[range], block_norms: Mapping[int, float], left: list[int], weights: _Weights
) -> tuple[list[float], torch.Tensor | None, int]:
    """The paper's form: one block anywhere beyond the covered tail, the zeroth order on whatever else is left."""
    c = settings.coefficients
    if settings.half_order is None or not blocks:
        weights.cover(left, c.zeroth_order, COEFFICIENTS)
        return [], None, 0
    probabilities = draw_probabilities(blocks, settings.half_order, block_norms)
    for block, probability in zip(blocks, probabilities.tolist(), strict=True):
        weights.cover(block, probability * c.half_order, COEFFICIENTS)
        weights.cover(set(left) - set(block), probability * c.zeroth_order, COEFFICIENTS)
    return [c.half_order] * len(blocks), probabilities, 1


def _candidates(settings: RLRSettings, chain: Chain, covered_tail: int) -> list[range]:
    """The half-order blocks beyond the covered tail: tiles, or with a zeroth order any block that starts with noise."""
    half_order, num_steps = settings.half_order, chain.num_steps
    if half_order is None or covered_tail >= num_steps or not half_order.draws_beyond(covered_tail):
        return []
    if settings.zeroth_order is None:
        noiseless = [t for t in range(1, num_steps + 1) if chain.std(t) == 0]
        return tiles(covered_tail + 1, num_steps, half_order.length, noiseless)
    blocks = free_blocks(covered_tail + 1, num_steps, min(half_order.length, num_steps - covered_tail))
    return [block for block in blocks if chain.std(block[0]) > 0]


def _why_left_out(settings: RLRSettings, chain: Chain, t: int) -> str | None:
    """Why it is by choice, or for lack of any term, that none covers step t; None where one must."""
    half_order = settings.half_order
    if half_order is None:
        return TRUNCATED
    if chain.std(t) == 0:
        return NEEDS_NOISE
    if half_order.start != "window":
        return None
    stages = [stage.name for stage in half_order.stage_windows if (stage.first, stage.last) == half_order.window]
    return OUTSIDE_WINDOW + (f" (measured: stage {stages[0]})" if stages else "")


def _why_none(settings: RLRSettings) -> str:
    """Why there is no term at all, and what to do."""
    no_gradient = "the reward has no gradient (or K is 0)"
    if settings.half_order is None and settings.black_box_steps == 0:
        return f"{no_gradient} and there are no half-order or zeroth-order terms. Use estimator rlr."
    return (
        f"{no_gradient} and score terms need noise, which no step has: eta is 0, or the chain's only step ends clean. "
        "Raise eta or num_inference_steps, or use a differentiable reward with first-order steps."
    )
