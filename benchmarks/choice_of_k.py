"""How good is the K that `rlr` chooses from few samples? Asked of many samples of tiny-shapes, split again and again.

    OMP_NUM_THREADS=1 python -m benchmarks.choice_of_k

Every rule chooses K from the 16 samples of one calibration; that of `rlr` also knows how large the advantages and
cotangents of past updates were. The variance that the choice costs is taken over all samples, and divided by that of
the best K. Gradients stay in ``--folder``; what is there already is not measured again.
Writes ``benchmarks/results/choice_of_k.json``.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import write_results
from rlr_peft.build import build_run, derive_seed
from rlr_peft.config import load_config
from rlr_peft.diagnose import first_and_half_order, sample_estimates
from rlr_peft.estimators import (
    GradientSketch,
    SignalSizes,
    StepGains,
    StepGradients,
    best_first_order_steps,
    leave_one_out,
    measure_step_gradients,
    sample_batch,
    step_variances,
)
from rlr_peft.files import replacing_file

GROUP = 4
CALIBRATION_SAMPLES = 16
# Of 1, 4 and 7 updates.
PAST_SAMPLES = (16, 64, 112)
TRIALS = 300
CASES = {
    "coarse (centered)": ["--reward_fn", "benchmarks.rewards:Centered"],
    "mid (star)": ["--reward_fn", "benchmarks.rewards:Star"],
    "fine (texture)": ["--reward_fn", "tiny-shapes/texture"],
    "guidance 20, mid (star)": ["--guidance_scale", "20", "--reward_fn", "benchmarks.rewards:Star"],
    "guidance 20, mid (shape)": ["--guidance_scale", "20", "--reward_fn", "tiny-shapes/shape"],
}
SMALLEST, HALVED = "smallest sum", "T unless halved"
INFORMED = {past: f"`rlr` after {past // 16} updates" for past in PAST_SAMPLES}
RULES = (SMALLEST, HALVED, *INFORMED.values())


def main() -> None:
    """Measures what is missing, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="4 for each prompt")
    parser.add_argument("--folder", type=Path, default=Path("outputs/choice_of_k"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| T = 10 | best K | full BP | K = 1 | " + " | ".join(RULES) + " |")
    print("|---" * (4 + len(RULES)) + "|")
    for name, flags in CASES.items():
        row = {"case": name} | judge(step_gradients(name, flags, arguments.folder, arguments.samples))
        rows.append(row)
        columns = ("full_bp", "one_step", *RULES)
        print(f"| {name} | {row['best_k']} | " + " | ".join(f"{row[key]:.2f}" for key in columns) + " |", flush=True)
    write_results("choice_of_k", {"samples": arguments.samples, "trials": TRIALS, "rows": rows})


def step_gradients(name: str, flags: list[str], folder: Path, samples: int) -> StepGradients:
    """Gradients of many samples through every step, measured or read."""
    path = folder / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{samples}.pt"
    if path.exists():
        return StepGradients(**torch.load(path, weights_only=True))
    words = ["--config", "benchmarks/laboratory.yaml", "--heldout_reward_fn", "null", "--report_to", "none"]
    run = build_run(load_config([*words, *flags]))
    prompts = [prompt for prompt in run.sampler.sample(0, samples // GROUP) for _ in range(GROUP)]
    seeds = [derive_seed(1, "calibration", 0, i) for i in range(samples)]
    batch = sample_batch(run.chain, run.objective, prompts, seeds, 16)
    advantages, sketch = leave_one_out(batch.rewards, GROUP), GradientSketch(run.chain.parameters, 1024)
    gradients = measure_step_gradients(run.chain, batch.rollouts, advantages, sketch)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as aside:
        torch.save(vars(gradients), aside)
    return gradients


def judge(gradients: StepGradients) -> dict[str, Any]:
    """Variances relative to that of the best K: of fixed choices, and of every rule on average over its choices."""
    num_steps = len(gradients.scores)
    variances = {
        k: sample_estimates(first_and_half_order(gradients, k)).variance
        for k in range(num_steps + 1)
        if k >= 1 or bool(gradients.has_noise[0])
    }
    best_k = min(variances, key=variances.__getitem__)
    costs: dict[str, list[float]] = {rule: [] for rule in RULES}
    for calibration, past in splits(gradients):
        measured, gains = step_variances(calibration), StepGains.of(calibration)
        chosen = {
            SMALLEST: best_first_order_steps(measured, worth_leaving_full=1.0),
            HALVED: best_first_order_steps(measured),
        }
        for samples, rule in INFORMED.items():
            sizes = [SignalSizes.of_calibration(part) for part in (calibration, select(past, torch.arange(samples)))]
            chosen[rule] = best_first_order_steps(gains.variances(SignalSizes().blend(sizes, decay=1.0)))
        for rule, k in chosen.items():
            costs[rule].append(variances[k] / variances[best_k])
    return {
        "best_k": best_k,
        "full_bp": variances[num_steps] / variances[best_k],
        "one_step": variances[1] / variances[best_k],
        **{rule: sum(values) / len(values) for rule, values in costs.items()},
    }


def splits(gradients: StepGradients) -> Iterator[tuple[StepGradients, StepGradients]]:
    """Samples of a calibration, and others that past updates saw; whole groups, drawn anew every time."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(len(gradients.advantages)).reshape(-1, GROUP)
    for _ in range(TRIALS):
        order = groups[torch.randperm(len(groups), generator=generator)].flatten()
        yield select(gradients, order[:CALIBRATION_SAMPLES]), select(gradients, order[CALIBRATION_SAMPLES:])


def select(gradients: StepGradients, samples: torch.Tensor) -> StepGradients:
    """The gradients of some samples."""
    assert gradients.pathwise is not None and gradients.cotangent_squares is not None
    return StepGradients(
        gradients.pathwise[:, samples],
        gradients.scores[:, samples],
        gradients.advantages[samples],
        gradients.has_noise,
        gradients.cotangent_squares[:, samples],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
