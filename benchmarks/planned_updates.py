"""What `rlr-peft plan` foresees of the updates that `benchmarks.real_run` measured on a GPU, method by method.

    python -m benchmarks.planned_updates --case stable-diffusion-1.5-512     # default: all

Needs neither the GPU nor weights. The measured peak is that of torch's allocator in the three phases of an update, so
the plan's tensors of these phases stand beside it, without allowances. Prints a table and writes
``benchmarks/results/planned_updates.json``.
"""

import argparse
from typing import Any

from benchmarks.machine import read_results, write_results
from benchmarks.real_run import CASES, METHODS, flags_of
from rlr_peft.config import load_config
from rlr_peft.plan import ADJOINT, DECODE, SAMPLING, plan_run

UPDATE = (SAMPLING, DECODE, ADJOINT)
MB = 2**20


def main() -> None:
    """Plans every measured update."""
    parser = argparse.ArgumentParser(description="What the memory plan foresees of measured updates.")
    parser.add_argument("--case", action="append", help="one case; may be given again")
    chosen = parser.parse_args().case
    results: dict[str, dict[str, Any]] = read_results("planned_updates").get("cases", {})
    print("| case | method | measured, MB | planned, MB | ratio | phase |\n|---|---|---|---|---|---|")
    for case, measured in read_results("real_run")["cases"].items():
        if chosen is not None and case not in chosen:
            continue
        results[case] = {}
        for method, update in measured.get("updates", {}).items():
            base = ["--pretrained_model_name_or_path", CASES[case][0]]
            plan = plan_run(load_config([*flags_of(case), *base, *METHODS[method].split()]))
            phase = max(UPDATE, key=plan.tensors)
            planned, peak = plan.tensors(phase) / MB, update["peak_memory_mb"]
            results[case][method] = {"measured_mb": peak, "planned_mb": planned, "phase": phase}
            print(f"| {case} | {method} | {peak:.0f} | {planned:.0f} | {planned / peak:.2f} | {phase} |", flush=True)
        write_results("planned_updates", {"cases": results})


if __name__ == "__main__":
    main()
