"""Variance x cost of every method on chains whose steps are formulas: tame ones, and some with chaotic early steps.

    python -m benchmarks.closed_form

Cost is denoiser evaluations plus twice the backward steps, per sample. On the mixtures a few samples in ten thousand
make up the variance of pathwise gradients, so it is given twice: of all estimates, and without the hundredth that is
farthest from their mean. Writes ``benchmarks/results/closed_form.json``.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.guided_mixture import GuidedMixtureChain, WaveReward
from benchmarks.machine import write_results
from rlr_peft.estimators import HalfOrder, RLREstimator, RLRSettings, Rollout, ZerothOrder
from rlr_peft.prompt import texts_of
from rlr_peft.testing import LinearGaussianChain, QuadraticReward

GROUP = 4
DIMENSION = 16
SINGLE = HalfOrder(1, "all")
# Updates of 16 samples before the variance is measured, in one of the rows of `rlr`: its K learns from them.
PAST_UPDATES = 50
# Share of the estimates that the trimmed variance leaves out.
TRIMMED = 0.01
# Groups that serve a method whose perturbation or drawn steps are shared by a batch: each is a batch of its own.
MAX_DRAWN_GROUPS = 500

ClosedFormChain = LinearGaussianChain | GuidedMixtureChain


@dataclass(frozen=True)
class Bed:
    """A chain with a reward.

    Attributes:
        chain: builds it from T and the number of replicates.
        differentiable: whether estimators may use the reward's gradient.
    """

    chain: Callable[[int, int], ClosedFormChain]
    differentiable: bool = True

    def objective(self, chain: ClosedFormChain) -> QuadraticReward | WaveReward:
        """The reward that goes with the chain."""
        if isinstance(chain, LinearGaussianChain):
            return QuadraticReward(chain, self.differentiable)
        return WaveReward(chain, self.differentiable)


def linear(num_steps: int, replicates: int) -> LinearGaussianChain:
    """A contracting linear chain."""
    return LinearGaussianChain(num_steps, DIMENSION, replicates, last_std=0.2, decay=(0.4, 0.35))


def narrow_mixture(num_steps: int, replicates: int) -> GuidedMixtureChain:
    """Narrow components and a smooth reward: the steps settle into one component early."""
    return GuidedMixtureChain(num_steps, DIMENSION, width=0.3, reward_frequency=1.0, replicates=replicates)


def wide_mixture(num_steps: int, replicates: int) -> GuidedMixtureChain:
    """Wide components and a fine reward: the early steps decide between components, and small changes matter."""
    return GuidedMixtureChain(num_steps, DIMENSION, width=0.8, replicates=replicates)


BEDS = {
    "linear": Bed(linear),
    "narrow mixture": Bed(narrow_mixture),
    "wide mixture": Bed(wide_mixture),
    "linear, no reward gradient": Bed(linear, differentiable=False),
}


def estimators(num_steps: int, differentiable: bool) -> dict[str, RLREstimator]:
    """What is compared."""
    tail = round((6 * num_steps) ** 0.5)
    settings: dict[str, RLRSettings] = {
        "`rlr`": RLRSettings("auto", SINGLE, black_box_steps=tail),
        f"`rlr` after {PAST_UPDATES} updates": RLRSettings("auto", SINGLE, black_box_steps=tail),
        "`rlr`, mixed orders": RLRSettings("auto", SINGLE, step_choice="inverse-variance"),
        "`full-bp`": RLRSettings(num_steps, None),
        "`reinforce`": RLRSettings(0, SINGLE),
        "`reinforce` with state baseline": RLRSettings(0, SINGLE, state_baseline=True),
        "FO_2 + single steps": RLRSettings(2, SINGLE),
        "FO_2 + single steps with state baseline": RLRSettings(2, SINGLE, state_baseline=True),
        "FO_2 + 4 drawn single steps": RLRSettings(2, HalfOrder(1, 4)),
        "FO_2 + tiles of h = 2": RLRSettings(2, HalfOrder(2, "all")),
        "FO_2 + tiles of h = 4": RLRSettings(2, HalfOrder(4, "all")),
        "`rlr-paper`, two-point": RLRSettings(1, HalfOrder(2, 1), ZerothOrder("two-point", 0.01)),
    }
    if not differentiable:
        kept = ("`rlr`", "`reinforce`", "`reinforce` with state baseline", "`rlr-paper`, two-point")
        settings = {name: settings[name] for name in kept}
    return {name: RLREstimator(chosen) for name, chosen in settings.items()}


def main() -> None:
    """Measures all beds and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=10_000, help="groups of 4 samples per estimator")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, bed in BEDS.items():
        for num_steps in (20, 50):
            rows += measure_bed(name, bed, num_steps, arguments.groups)
    write_results("closed_form", {"group_size": GROUP, "rows": rows})


def measure_bed(name: str, bed: Bed, num_steps: int, groups: int) -> list[dict[str, Any]]:
    """One row per estimator; prints them."""
    rows: list[dict[str, Any]] = []
    for label, estimator in estimators(num_steps, bed.differentiable).items():
        measured = measure(estimator, bed, num_steps, groups, PAST_UPDATES if "after" in label else 0)
        rows.append({"bed": name, "T": num_steps, "estimator": label} | measured)
    # Shown, but not the unit: the zeroth order, biased at s > 0, and score terms alone where step 1 has no noise.
    misses_a_step = bed.differentiable and bed.chain(num_steps, 1).std(1) == 0
    unbiased = [row for row in rows if "rlr-paper" not in row["estimator"] and not (misses_a_step and row["K"] == 0)]
    print(f"\n**{name}, T = {num_steps}**\n")
    print("| estimator | K | cost | variance | x cost / best | trimmed | x cost / best |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("variance", "trimmed"):
        best = min(row[kind] * row["cost"] for row in unbiased)
        for row in rows:
            row[f"{kind}_ratio"] = row[kind] * row["cost"] / best
    for row in rows:
        print(
            f"| {row['estimator']} | {row['K']} | {row['cost']:.0f} | {row['variance']:.3g} | "
            f"{row['variance_ratio']:.3g} | {row['trimmed']:.3g} | {row['trimmed_ratio']:.3g} |",
            flush=True,
        )
    return rows


def measure(estimator: RLREstimator, bed: Bed, num_steps: int, groups: int, past_updates: int) -> dict[str, float]:
    """Variances of one group's estimate of the mean reward's gradient, cost of a sample, and K of the last estimate."""
    generator = torch.Generator().manual_seed(0)

    def rollout(chain: ClosedFormChain, samples: int, seed: int) -> tuple[Rollout, torch.Tensor]:
        trajectory = chain.sample([""] * samples, [seed] * samples)
        rewards, gradient = bed.objective(chain).score_with_gradient(trajectory.latents[0], trajectory.prompts)
        advantages = estimator.advantages(rewards, texts_of(trajectory.prompts), GROUP)
        return Rollout(trajectory, rewards, gradient if bed.differentiable else None), advantages

    single = bed.chain(num_steps, 1)
    if bed.differentiable and estimator.wants_calibration(True):
        calibration, advantages = rollout(single, 16, seed=0)
        estimator.calibrate(single, [calibration], advantages, decay=0.0)
    for update in range(past_updates):
        past = estimator.accumulate(single, bed.objective(single), *rollout(single, 16, seed=1 + update), generator)
        estimator.learn([past])
    # A perturbation and drawn steps serve a whole batch: one group at a time shows their noise.
    draws = estimator.settings.zeroth_order is not None or estimator.settings.half_order not in (None, SINGLE)
    replicates, calls = (1, min(groups, MAX_DRAWN_GROUPS)) if draws else (250, groups // 250)
    chain, estimates = bed.chain(num_steps, replicates), []
    for call in range(calls):
        before = chain.denoiser_evaluations
        batch = rollout(chain, replicates * GROUP, seed=1000 + call)  # the same samples for every estimator
        book = estimator.accumulate(chain, bed.objective(chain), *batch, generator)
        if estimator.settings.state_baseline:  # the others are measured as they are
            estimator.learn([book])
        evaluations = num_steps + (chain.denoiser_evaluations - before) / (replicates * GROUP)
        gradients = [parameter.grad for parameter in chain.parameters if parameter.grad is not None]
        estimates.append(torch.cat([gradient.reshape(replicates, -1) for gradient in gradients], dim=1) / GROUP)
        for parameter in chain.parameters:
            parameter.grad = None
    samples = torch.cat(estimates)
    squares = (samples - samples.mean(0)).square().sum(1).sort().values
    return {
        "variance": float(squares.mean()),
        "trimmed": float(squares[: math.ceil(len(squares) * (1 - TRIMMED))].mean()),
        "cost": evaluations + 2 * book.backward_passes,
        "K": book.first_order_steps,
    }


if __name__ == "__main__":
    main()
