"""Decides which step of the chain is covered by which term, and adds up the expected weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from rlr_peft.chain.interface import Chain
from rlr_peft.estimators.coverage import Coverage, CoverageError
from rlr_peft.estimators.half_order import (
    DEFENSIVE_SHARE,
    Block,
    HalfOrder,
    draw,
    draw_probabilities,
    expected_draws,
    free_blocks,
    tiles,
)
from rlr_peft.estimators.rlr_settings import Coefficients, RLRSettings


@dataclass(frozen=True)
class Plan:
    """What one micro-batch will do.

    Attributes:
        first_order_steps: K; 0 for none.
        black_box_steps: steps with a black-box tail term.
        blocks: half-order blocks with their weights.
        zeroth_order_steps: steps whose parameters are perturbed.
        coverage: expected weight of every step.
        mixture: weight of the pathwise term of steps 1..K, (K,), the score term's being the rest; None for 1.
    """

    first_order_steps: int
    black_box_steps: list[int]
    blocks: list[tuple[Block, float]]
    zeroth_order_steps: list[int]
    coverage: Coverage
    mixture: torch.Tensor | None = None


def make_plan(
    settings: RLRSettings,
    chain: Chain,
    *,
    first_order_steps: int,
    differentiable: bool,
    running_norms: Mapping[int, float],
    generator: torch.Generator,
    mixture: torch.Tensor | None = None,
) -> Plan:
    """Draws the blocks of one micro-batch and checks the coverage.

    Args:
        settings: the terms.
        chain: its steps and their noise.
        first_order_steps: K; ignored for a reward without gradient.
        differentiable: whether the reward has a gradient.
        running_norms: running gradient norm by first step of a block.
        generator: for random blocks, on the CPU.
        mixture: weight of the pathwise term of steps 1..K, (K,); None for 1.

    Raises:
        CoverageError: there is no term for this reward, or a step is not covered as it should be.
    """
    num_steps, coefficients = chain.num_steps, settings.coefficients
    tail = range(1, first_order_steps + 1) if differentiable else range(0)
    mirrored = range(0) if differentiable else range(1, min(settings.black_box_steps, num_steps) + 1)
    black_box = [t for t in mirrored if chain.std(t) > 0]
    covered_tail = max(len(tail), len(mirrored))
    weights = _Weights(num_steps)
    for t in tail:
        share = 1.0 if mixture is None else float(mixture[t - 1])
        weights.add([t], share * coefficients.first_order + (1 - share) * coefficients.half_order)
    weights.add(black_box, coefficients.half_order)
    if settings.zeroth_order is not None:
        left = [t for t in range(1, num_steps + 1) if t not in tail and t not in black_box]
        blocks, zeroth = _block_and_complement(settings, chain, covered_tail, left, weights, running_norms, generator)
    else:
        blocks, zeroth = _tiles(settings, chain, covered_tail, weights, running_norms, generator), []
    if not (tail or black_box or blocks or zeroth):
        raise CoverageError(f"Expected an estimator with a term for this reward, got none: {_why_none(settings)}")
    is_cut_at_random = settings.first_order_steps == "random" and bool(tail) and _is_pathwise_alone(settings)
    if is_cut_at_random:
        chance_of_reaching = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
        weights.values = coefficients.first_order * chance_of_reaching
    smoothing = settings.zeroth_order.scale if settings.zeroth_order is not None and zeroth else None
    coverage = Coverage(weights.values, _gaps(settings, chain, weights, is_cut_at_random), smoothing)
    coverage.check()
    return Plan(len(tail), black_box, blocks, zeroth, coverage, mixture if tail else None)


class _Weights:
    """Expected weight of every step."""

    def __init__(self, num_steps: int) -> None:
        self.values = torch.zeros(num_steps, dtype=torch.float64)

    def __getitem__(self, t: int) -> float:
        return float(self.values[t - 1])

    def add(self, steps: Iterable[int], weight: float) -> None:
        for t in steps:
            self.values[t - 1] += weight


def _tiles(
    settings: RLRSettings,
    chain: Chain,
    covered_tail: int,
    weights: _Weights,
    running_norms: Mapping[int, float],
    generator: torch.Generator,
) -> list[tuple[Block, float]]:
    """Tiles of the steps beyond the covered tail, all of them or M drawn ones with weight 1 / q."""
    half_order = settings.half_order
    if half_order is None or not half_order.draws_beyond(covered_tail):
        return []
    noiseless = [t for t in range(1, chain.num_steps + 1) if chain.std(t) == 0]
    blocks = tiles(covered_tail + 1, chain.num_steps, half_order.length, noiseless)
    if not blocks:
        return []
    if half_order.blocks == "all":
        expectations, chosen = [1.0] * len(blocks), list(range(len(blocks)))
    else:
        probabilities = draw_probabilities(blocks, half_order, running_norms, DEFENSIVE_SHARE)
        expectations = expected_draws(probabilities, half_order.blocks).tolist()
        chosen = draw(probabilities, half_order.blocks, generator)
    coefficient = settings.coefficients.half_order
    block_weights = [coefficient / expectation if expectation > 0 else 0.0 for expectation in expectations]
    for block, expectation, weight in zip(blocks, expectations, block_weights, strict=True):
        weights.add(block.steps, expectation * weight)
    return [(blocks[i], block_weights[i]) for i in chosen]


def _block_and_complement(
    settings: RLRSettings,
    chain: Chain,
    covered_tail: int,
    left: list[int],
    weights: _Weights,
    running_norms: Mapping[int, float],
    generator: torch.Generator,
) -> tuple[list[tuple[Block, float]], list[int]]:
    """The paper's form: one block anywhere beyond the covered tail, the zeroth order on whatever else is left."""
    half_order, num_steps, coefficients = settings.half_order, chain.num_steps, settings.coefficients
    candidates: list[Block] = []
    if half_order is not None and covered_tail < num_steps and half_order.draws_beyond(covered_tail):
        length = min(half_order.length, num_steps - covered_tail)
        candidates = [b for b in free_blocks(covered_tail + 1, num_steps, length) if chain.std(b.first_step) > 0]
    if half_order is None or not candidates:
        weights.add(left, coefficients.zeroth_order)
        return [], left

    def complement(block: Block) -> list[int]:
        return [t for t in left if t not in block.steps]

    probabilities = draw_probabilities(candidates, half_order, running_norms)
    for block, probability in zip(candidates, probabilities.tolist(), strict=True):
        weights.add(block.steps, probability * coefficients.half_order)
        weights.add(complement(block), probability * coefficients.zeroth_order)
    block = candidates[draw(probabilities, 1, generator)[0]]
    return [(block, coefficients.half_order)], complement(block)


def _why_none(settings: RLRSettings) -> str:
    """Why there is no term at all, and what to do."""
    no_gradient = "the reward has no gradient (or K is 0)"
    if settings.half_order is None and settings.black_box_steps == 0:
        return f"{no_gradient} and there are no half-order or zeroth-order terms. Use estimator rlr."
    return (
        f"{no_gradient} and score terms need noise, which no step has: eta is 0, or the chain's only step ends clean. "
        "Raise eta or num_inference_steps, or use a differentiable reward with first-order steps."
    )


def _is_pathwise_alone(settings: RLRSettings) -> bool:
    return settings.half_order is None and settings.zeroth_order is None


def _window_words(half_order: HalfOrder) -> str:
    chosen = [stage.name for stage in half_order.stage_windows if (stage.first, stage.last) == half_order.window]
    return f" (measured: stage {chosen[0]})" if chosen else ""


def _gaps(settings: RLRSettings, chain: Chain, weights: _Weights, is_cut_at_random: bool) -> dict[int, str]:
    """Why a step may have another weight than 1: only by choice, or because no term exists for it."""
    gaps = {}
    for t in range(1, chain.num_steps + 1):
        if abs(weights[t] - 1) <= 1e-9:
            continue
        if is_cut_at_random:
            gaps[t] = "left out at times because the gradient is truncated at a random step"
        elif weights[t] == 0 and settings.half_order is None:
            gaps[t] = "left out because the gradient is truncated"
        elif weights[t] == 0 and chain.std(t) == 0:
            gaps[t] = "left out because a score term needs noise there"
        elif weights[t] == 0 and settings.half_order is not None and settings.half_order.start == "window":
            gaps[t] = "left out, outside the chosen window" + _window_words(settings.half_order)
        elif settings.coefficients != Coefficients():
            gaps[t] = "given another weight than 1 by the chosen coefficients"
    return gaps
