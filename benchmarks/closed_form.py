"""Variance x cost of every method on the linear-Gaussian chain: tame, and with early steps that amplify.

    python -m benchmarks.closed_form

Cost is denoiser evaluations plus twice the backward steps, per sample. Writes ``benchmarks/results/closed_form.json``.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.machine import write_results
from rlr_peft.estimators.half_order import HalfOrder
from rlr_peft.estimators.plan import RLRSettings
from rlr_peft.estimators.rlr import RLREstimator
from rlr_peft.estimators.rollout import Rollout
from rlr_peft.estimators.zeroth_order import ZerothOrder
from rlr_peft.testing.linear_gaussian_chain import LinearGaussianChain, QuadraticReward, WaveReward

GROUP = 4
SINGLE = HalfOrder(1, "all")


@dataclass(frozen=True)
class Bed:
    """A chain with a reward.

    Attributes:
        decay: a_1 and a_T of the chain; above 1 it amplifies.
        reward: the objective's class.
        differentiable: whether estimators may use its gradient.
    """

    decay: tuple[float, float]
    reward: type[QuadraticReward] | type[WaveReward]
    differentiable: bool = True


BEDS = {
    "tame": Bed((0.4, 0.35), QuadraticReward),
    "early steps amplify, bounded reward": Bed((0.4, 1.1), WaveReward),
    "no gradient": Bed((0.4, 0.35), QuadraticReward, differentiable=False),
}


def estimators(num_steps: int, differentiable: bool) -> dict[str, RLREstimator]:
    """What is compared."""
    tail = round((6 * num_steps) ** 0.5)
    settings: dict[str, RLRSettings] = {
        "`rlr`": RLRSettings("auto", SINGLE, black_box_steps=tail),
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
    parser.add_argument("--groups", type=int, default=1000, help="groups of 4 samples per estimator")
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
        variance, cost, k = measure(estimator, bed, num_steps, groups)
        rows.append({"bed": name, "T": num_steps, "estimator": label, "variance": variance, "cost": cost, "K": k})
    # The zeroth order is biased at s > 0: shown, but not the unit.
    best = min(row["variance"] * row["cost"] for row in rows if "rlr-paper" not in row["estimator"])
    print(f"\n**{name}, T = {num_steps}**\n\n| estimator | K | variance | cost | variance x cost / best unbiased |")
    print("|---|---|---|---|---|")
    for row in rows:
        row["ratio"] = row["variance"] * row["cost"] / best
        print(
            f"| {row['estimator']} | {row['K']} | {row['variance']:.3g} | {row['cost']:.0f} | {row['ratio']:.3g} |",
            flush=True,
        )
    return rows


def measure(estimator: RLREstimator, bed: Bed, num_steps: int, groups: int) -> tuple[float, float, int]:
    """Variance of one group's estimate of the mean reward's gradient, cost of a sample, and K of the last estimate."""
    generator = torch.Generator().manual_seed(0)

    def rollout(chain: LinearGaussianChain, samples: int) -> Rollout:
        trajectory = chain.sample([""] * samples, torch.randint(2**62, (samples,), generator=generator).tolist())
        objective = bed.reward(chain, bed.differentiable)
        rewards, gradient = objective.score_with_gradient(trajectory.latents[0], trajectory.prompts)
        advantages = estimator.advantages(rewards, trajectory.prompts, GROUP)
        return Rollout(trajectory, rewards, advantages, gradient if bed.differentiable else None)

    def chain_of(replicates: int) -> LinearGaussianChain:
        return LinearGaussianChain(num_steps, dimension=16, replicates=replicates, last_std=0.2, decay=bed.decay)

    if bed.differentiable and estimator.needs_calibration:
        estimator.calibrate(chain_of(1), [rollout(chain_of(1), 16)], decay=0.0)
    # A perturbation and drawn steps serve a whole batch: one group at a time shows their noise.
    draws = estimator.settings.zeroth_order is not None or estimator.settings.half_order not in (None, SINGLE)
    replicates = 1 if draws else 250
    chain, estimates = chain_of(replicates), []
    for _ in range(groups // replicates):
        before = chain.denoiser_evaluations
        batch = rollout(chain, replicates * GROUP)
        report = estimator.accumulate(chain, bed.reward(chain), batch, generator)
        estimator.remember([report.memory])
        evaluations = num_steps + (chain.denoiser_evaluations - before) / (replicates * GROUP)
        gradients = [parameter.grad for parameter in chain.parameters if parameter.grad is not None]
        estimates.append(torch.cat([gradient.reshape(replicates, -1) for gradient in gradients], dim=1) / GROUP)
        for parameter in chain.parameters:
            parameter.grad = None
    variance = float(torch.cat(estimates).var(dim=0).sum())
    return variance, evaluations + 2 * report.backward_steps, report.first_order_steps


if __name__ == "__main__":
    main()
