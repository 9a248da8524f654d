"""Decides which step of the chain is covered by which term, and adds up the expected weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

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
from rlr_peft.estimators.zeroth_order import ZerothOrder


@dataclass(frozen=True)
class RLRSettings:
    """What the estimator is made of.

    Attributes:
        first_order_steps: K, or "auto" for the measured crossing of the per-step variances.
        half_order: blocks beyond K; None leaves them to the zeroth order or uncovered.
        zeroth_order: covers what the other terms leave over; None for nothing.
        black_box_steps: steps 1..n that get black-box tail terms when the reward has no gradient.
    """

    first_order_steps: int | Literal["auto"] = "auto"
    half_order: HalfOrder | None = HalfOrder(length=1, blocks="all")
    zeroth_order: ZerothOrder | None = None
    black_box_steps: int = 0

    def describe(self) -> str:
        """The terms in words, for logs and cards."""
        tail = "K measured" if self.first_order_steps == "auto" else f"K = {self.first_order_steps}"
        terms = [f"first order on steps 1..K, {tail}"]
        if self.half_order is not None:
            terms.append(self.half_order.describe())
        if self.zeroth_order is not None:
            terms.append(f"{self.zeroth_order.form} zeroth order with s = {self.zeroth_order.scale:g} on the rest")
        return "; ".join(terms)


@dataclass(frozen=True)
class Plan:
    """What one micro-batch will do.

    Attributes:
        first_order_steps: K; 0 for none.
        black_box_steps: steps with a black-box tail term.
        blocks: half-order blocks with their weights.
        zeroth_order_steps: steps whose parameters are perturbed.
        coverage: expected weight of every step.
    """

    first_order_steps: int
    black_box_steps: list[int]
    blocks: list[tuple[Block, float]]
    zeroth_order_steps: list[int]
    coverage: Coverage


def make_plan(
    settings: RLRSettings,
    chain: Chain,
    *,
    first_order_steps: int,
    differentiable: bool,
    running_norms: Mapping[int, float],
    generator: torch.Generator,
) -> Plan:
    """Draws the blocks of one micro-batch and checks the coverage.

    Args:
        settings: the terms.
        chain: its steps and their noise.
        first_order_steps: K; ignored for a reward without gradient.
        differentiable: whether the reward has a gradient.
        running_norms: running gradient norm by first step of a block.
        generator: for random blocks, on the CPU.

    Raises:
        CoverageError: there is no term for this reward, or a step is not covered as it should be.
    """
    num_steps = chain.num_steps
    tail = range(1, first_order_steps + 1) if differentiable else range(0)
    mirrored = range(0) if differentiable else range(1, min(settings.black_box_steps, num_steps) + 1)
    black_box = [t for t in mirrored if chain.std(t) > 0]
    beyond = max(len(tail), len(mirrored)) + 1
    weights = _Weights(num_steps)
    weights.add([*tail, *black_box], 1.0)
    if settings.zeroth_order is not None:
        left = [t for t in range(1, num_steps + 1) if weights[t] == 0]
        blocks, zeroth = _block_and_complement(settings, chain, beyond, left, weights, running_norms, generator)
    else:
        blocks, zeroth = _tiles(settings, chain, beyond, weights, running_norms, generator), []
    if not (tail or black_box or blocks or zeroth):
        raise CoverageError(
            "Expected an estimator with a term for this reward, got none: the reward has no gradient (or K is 0) and "
            "there are no half-order or zeroth-order terms. Use estimator rlr."
        )
    smoothing = settings.zeroth_order.scale if settings.zeroth_order is not None and zeroth else None
    coverage = Coverage(weights.values, _gaps(settings, chain, weights), smoothing)
    coverage.check()
    return Plan(len(tail), black_box, blocks, zeroth, coverage)


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
    first_step: int,
    weights: _Weights,
    running_norms: Mapping[int, float],
    generator: torch.Generator,
) -> list[tuple[Block, float]]:
    """Tiles of the steps from ``first_step`` on, all of them or M drawn ones with weight 1 / q."""
    half_order = settings.half_order
    if half_order is None:
        return []
    noiseless = [t for t in range(1, chain.num_steps + 1) if chain.std(t) == 0]
    blocks = tiles(first_step, chain.num_steps, half_order.length, noiseless)
    if not blocks:
        return []
    if half_order.blocks == "all":
        expectations, chosen = [1.0] * len(blocks), list(range(len(blocks)))
    else:
        probabilities = draw_probabilities(blocks, half_order, running_norms, DEFENSIVE_SHARE)
        expectations = expected_draws(probabilities, half_order.blocks).tolist()
        chosen = draw(probabilities, half_order.blocks, generator)
    block_weights = [1 / expectation if expectation > 0 else 0.0 for expectation in expectations]
    for block, expectation, weight in zip(blocks, expectations, block_weights, strict=True):
        weights.add(block.steps, expectation * weight)
    return [(blocks[i], block_weights[i]) for i in chosen]


def _block_and_complement(
    settings: RLRSettings,
    chain: Chain,
    first_step: int,
    left: list[int],
    weights: _Weights,
    running_norms: Mapping[int, float],
    generator: torch.Generator,
) -> tuple[list[tuple[Block, float]], list[int]]:
    """The paper's form: one block anywhere from ``first_step`` on, the zeroth order on whatever else is left."""
    half_order, num_steps = settings.half_order, chain.num_steps
    candidates: list[Block] = []
    if half_order is not None and first_step <= num_steps:
        length = min(half_order.length, num_steps - first_step + 1)
        candidates = [b for b in free_blocks(first_step, num_steps, length) if chain.std(b.first_step) > 0]
    if half_order is None or not candidates:
        weights.add(left, 1.0)
        return [], left

    def complement(block: Block) -> list[int]:
        return [t for t in left if t not in block.steps]

    probabilities = draw_probabilities(candidates, half_order, running_norms)
    for block, probability in zip(candidates, probabilities.tolist(), strict=True):
        weights.add([*block.steps, *complement(block)], probability)
    block = candidates[draw(probabilities, 1, generator)[0]]
    return [(block, 1.0)], complement(block)


def _gaps(settings: RLRSettings, chain: Chain, weights: _Weights) -> dict[int, str]:
    """Why a step may be left out: only by choice, or because no term exists for it."""
    gaps = {}
    for t in [t for t in range(1, chain.num_steps + 1) if weights[t] == 0]:
        if settings.half_order is None:
            gaps[t] = "the gradient is truncated there"
        elif chain.std(t) == 0:
            gaps[t] = "a score term needs noise there"
        elif settings.half_order.start == "window":
            gaps[t] = "outside the chosen window"
    return gaps
