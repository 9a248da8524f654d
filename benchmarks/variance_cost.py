"""Variance x cost of every method on tiny-shapes: a real UNet with guidance, T = 20 and 50, four kinds of reward.

    OMP_NUM_THREADS=1 python -m benchmarks.variance_cost --steps 10 20
    OMP_NUM_THREADS=1 python -m benchmarks.variance_cost --steps 50 --samples 8

Each case is a run of ``rlr-peft diagnose``; its report stays in ``--folder``, and cases that are there already are not
measured again. Prints the tables of ``docs/estimators_measured.md`` and writes
``benchmarks/results/variance_cost.json``, where cases of other lengths stay as they are.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.machine import read_results, write_results
from rlr_peft.diagnose import diagnose_command

REWARDS = {
    "coarse (brightness)": "benchmarks.rewards:brightness",
    "mid (shape)": "tiny-shapes/shape",
    "fine (texture)": "tiny-shapes/texture",
    "no gradient (JPEG size)": "jpeg-compressibility",
}


def cases(lengths: list[int]) -> dict[str, list[str]]:
    """Flags by name of the case; T = 10 stands for strong guidance."""
    strong = ["--guidance_scale", "20"]
    chosen = {}
    for steps in lengths:
        if steps == 10:
            chosen["T = 10, guidance 20, all attributes"] = strong
            chosen["T = 10, guidance 20, mid (shape)"] = [*strong, "--reward_fn", "tiny-shapes/shape"]
        else:
            for kind, spec in REWARDS.items():
                chosen[f"T = {steps}, {kind}"] = ["--num_inference_steps", str(steps), "--reward_fn", spec]
    return chosen


def main() -> None:
    """Measures what is missing, and prints one table per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("outputs/variance_cost"))
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50], help="lengths T of the chain")
    arguments = parser.parse_args()
    rows = []
    for name, flags in cases(arguments.steps).items():
        report = arguments.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.html"
        if not report.with_suffix(".json").exists():
            words = ["--config", "benchmarks/laboratory.yaml", "--heldout_reward_fn", "null", "--report_to", "none"]
            words += ["--num_images_per_prompt", "4", "--samples", str(arguments.samples), "--output", str(report)]
            diagnose_command([*words, *flags])
        numbers = json.loads(report.with_suffix(".json").read_text())
        rows += [row | {"samples": arguments.samples} for row in case_rows(name, numbers)]
    measured = {row["case"] for row in rows}
    kept = [row for row in read_results("variance_cost").get("rows", []) if row["case"] not in measured]
    write_results("variance_cost", {"rows": kept + rows})


def case_rows(name: str, numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparable methods of a case, the best unbiased one as unit; prints them."""
    methods = [method for method in numbers["methods"] if not method["own_units"]]
    unit = min(method["variance_times_cost"] for method in methods if _counts_as_unbiased(method, methods))
    print(f"\n**{name}**\n\n| method | variance | NFEs | backwards | variance x cost / best unbiased | coverage |")
    print("|---|---|---|---|---|---|")
    rows = []
    for method in methods:
        ratio = method["variance_times_cost"] / unit
        rows.append({"case": name, "ratio": ratio, **method})
        print(
            f"| {method['name']} | {method['variance']:.3g} ± {method['variance_se']:.2g} | "
            f"{method['denoiser_evaluations']:.0f} | {method['backward_passes']:.0f} | {ratio:.3g} | "
            f"{_coverage_in_words(method, methods)} |"
        )
    return rows


def _counts_as_unbiased(method: dict[str, Any], methods: list[dict[str, Any]]) -> bool:
    """Whether it covers all that score terms can: without a reward gradient nothing covers a step without noise."""
    exact = [other for other in methods if "smoothed" not in other["coverage"]]
    return method in exact and _uncovered(method) == min(_uncovered(other) for other in exact)


def _coverage_in_words(method: dict[str, Any], methods: list[dict[str, Any]]) -> str:
    if method["unbiased"]:
        return "unbiased"
    return "all but the noiseless step" if _counts_as_unbiased(method, methods) else "biased"


def _uncovered(method: dict[str, Any]) -> int:
    return sum(weight < 1 - 1e-9 for weight in method["coverage_weights"])


if __name__ == "__main__":
    main()
