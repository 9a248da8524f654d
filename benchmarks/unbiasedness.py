"""Bias and variance of every estimator on a linear-Gaussian chain with a closed-form gradient.

    python -m benchmarks.unbiasedness

Writes ``benchmarks/results/unbiasedness.json`` and prints the table of ``docs/estimators_measured.md``.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.machine import write_results
from rlr_peft.config import METHODS, D3POArguments, DDPOArguments, GRPOArguments
from rlr_peft.estimators import (
    Coefficients,
    Estimator,
    HalfOrder,
    RLREstimator,
    RLRSettings,
    RunShape,
    ZerothOrder,
    build_estimator,
)
from rlr_peft.testing import critical_z, measure_bias

T = 6
COMPONENTS = 12  # parameters of the chain: a 3 x 3 matrix and a vector
SINGLE = HalfOrder(length=1, blocks="all")
TWO_POINT = ZerothOrder("two-point", 0.01)
# A perturbation serves a whole batch, and a roulette lets samples drop out of it one by one: no copies of the chain.
PERTURBED = {"replicates": 1, "group_size": 16}
ROULETTE = {"replicates": 1, "group_size": 8}

RLR: dict[str, tuple[RLRSettings, dict]] = {
    "`rlr` (K measured, then all single steps)": (RLRSettings("auto", SINGLE), {}),
    "`rlr`, orders mixed by measured variances": (RLRSettings("auto", SINGLE, step_choice="inverse-variance"), {}),
    "`rlr`, reward without gradient, sigma_1 > 0": (
        RLRSettings("auto", SINGLE, black_box_steps=3),
        {"differentiable": False, "last_std": 0.2},
    ),
    "FO_1 + all single steps": (RLRSettings(1, SINGLE), {}),
    "the same with a state baseline": (RLRSettings(1, SINGLE, state_baseline=True), {}),
    "FO_3 + all single steps": (RLRSettings(3, SINGLE), {}),
    "FO_2 + tiles of h = 2": (RLRSettings(2, HalfOrder(2, "all")), {}),
    "FO_1 + 2 random single steps, weight 1/q": (RLRSettings(1, HalfOrder(1, 2)), {}),
    "FO_1 + 1 random block of h = 2, weight 1/q": (RLRSettings(1, HalfOrder(2, 1)), {}),
    "FO_1 + 2 blocks by gradient norm, weight 1/q": (RLRSettings(1, HalfOrder(1, 2, "gradient-norm")), {}),
    "`rlr`, roulette tail (K measured)": (RLRSettings("auto", SINGLE, roulette=True), ROULETTE),
    "FO_3 by roulette + all single steps": (RLRSettings(3, SINGLE, roulette=True), ROULETTE),
    "`reinforce` (sigma_1 > 0)": (RLRSettings(0, SINGLE), {"last_std": 0.2}),
    "`rlr-paper`: FO_1 + block of h = 2 + ZO two-point s = .01": (
        RLRSettings(1, HalfOrder(2, 1), TWO_POINT),
        PERTURBED,
    ),
    "the same, block from a window": (RLRSettings(1, HalfOrder(2, 1, "window", (3, 4)), TWO_POINT), PERTURBED),
    "the same, ZO one-point s = .1": (
        RLRSettings(1, HalfOrder(2, 1), ZerothOrder("one-point", 0.1)),
        PERTURBED,
    ),
    "FO_1 + block from a window, no ZO (biased)": (RLRSettings(1, HalfOrder(1, 1, "window", (3, 4))), {}),
    "FO_1 + single steps with coefficient 1/2 (biased)": (
        RLRSettings(1, SINGLE, coefficients=Coefficients(half_order=0.5)),
        {},
    ),
    "ZO two-point s = 1 (biased)": (RLRSettings(0, None, ZerothOrder("two-point", 1.0)), PERTURBED),
}

OTHERS: dict[str, tuple[Callable[[], Estimator], dict]] = {
    "FO_1 + single steps, antithetic": (
        lambda: RLREstimator(RLRSettings(1, SINGLE), antithetic=True),
        {"antithetic": True},
    ),
    "a mistake: the partner left in the baseline (biased)": (
        lambda: RLREstimator(RLRSettings(1, SINGLE)),
        {"antithetic": True},
    ),
    "`ddpo` on policy, sigma_1 > 0 (biased)": (
        lambda: build_estimator(DDPOArguments(inner_epochs=1), RunShape(T)),
        {"last_std": 0.2, "calls": 100},  # its statistics are kept prompt by prompt, in Python
    ),
    "`grpo` on policy, sigma_1 > 0 (biased)": (
        lambda: build_estimator(GRPOArguments(), RunShape(T)),
        {"last_std": 0.2},
    ),
    "`d3po`, sigma_1 > 0 (another objective)": (
        lambda: build_estimator(D3POArguments(), RunShape(T)),
        {"last_std": 0.2},
    ),
}


PATHWISE: dict[str, dict[str, Any]] = {
    "`full-bp`": {"estimator": "full-bp"},
    "`truncated-bp` K = 1 (biased)": {"estimator": "truncated-bp"},
    "`truncated-bp` K = 3 (biased)": {"estimator": "truncated-bp", "fo_steps": 3},
    "`truncated-bp` K random (biased)": {"estimator": "truncated-bp", "fo_steps": "random"},
    "`draft-lv` (biased)": {"estimator": "draft-lv"},
    "`drtune` (biased)": {"estimator": "drtune"},
    "`leap` (biased)": {"estimator": "leap"},
    "`flowbp-sparse` (biased)": {"estimator": "flowbp-sparse"},
    "`flowbp-sparse`, drawn evenly (biased)": {"estimator": "flowbp-sparse", "step_density": 0},
    "`flowbp-bridge` (biased)": {"estimator": "flowbp-bridge"},
    "`rsm` (biased)": {"estimator": "rsm"},
    "`adjoint-matching` (biased)": {"estimator": "adjoint-matching"},
    "`refl` from the last 2 steps (biased)": {"estimator": "refl", "fo_steps": 2},
}
OTHERS |= {
    name: (partial(build_estimator, METHODS[str(knobs.pop("estimator"))](**knobs), RunShape(T)), {})
    for name, knobs in PATHWISE.items()
}


def main() -> None:
    """Measures every estimator and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=400, help="independent estimates on copies of the chain")
    parser.add_argument("--perturbed_calls", type=int, default=8000, help="independent estimates without copies")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    critical = critical_z(COMPONENTS * (len(RLR) + len(OTHERS)), confidence=0.99)
    print(f"critical |z| = {critical:.2f} (99 % over all components of all rows)\n")
    print("| estimator | estimates | max abs z | mean / exact | coverage |\n|---|---|---|---|---|")
    rows = []
    for name, (settings, options) in RLR.items():
        calls = arguments.perturbed_calls if "replicates" in options else arguments.calls
        rows.append(measured_row(name, RLREstimator(settings), {"calls": calls, **options}, arguments.seed))
    for name, (build, options) in OTHERS.items():
        rows.append(measured_row(name, build(), {"calls": arguments.calls, **options}, arguments.seed))
    write_results("unbiasedness", {"critical_z": critical, "rows": rows})


def measured_row(name: str, estimator: Estimator, options: dict, seed: int) -> dict[str, object]:
    """Measures one estimator, prints its line, and returns its record."""
    bias = measure_bias(estimator, num_steps=T, seed=seed, **options)
    claim = bias.coverage.describe()
    print(f"| {name} | {bias.estimates} | {bias.max_abs_z:.2f} | {bias.projection:.3f} | {claim} |", flush=True)
    numbers = {key: getattr(bias, key) for key in ("max_abs_z", "projection", "variance", "estimates")}
    return {"estimator": name, **numbers, "unbiased": bias.coverage.unbiased, "coverage": claim}


if __name__ == "__main__":
    main()
