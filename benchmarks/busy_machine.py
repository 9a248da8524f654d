"""Training with as many threads as cores, alone and beside another busy program: do waiting threads spin or sleep?

    python -m benchmarks.busy_machine

Seconds of an update of the demo with both settings of ``OMP_WAIT_POLICY``; ours is PASSIVE unless it is set. Written to
``benchmarks/results/busy_machine.json``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

from benchmarks.machine import write_results

POLICIES = ("PASSIVE", "ACTIVE")
WARM_UPS, TIMED = 1, 3
FLAGS = "--config configs/tiny_shapes.yaml --estimator truncated-bp --learning_rate 1e-3 --report_to none".split()


def main() -> None:
    """Measures every setting in a process of its own, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().here:
        print(seconds_of_an_update())
        return
    rows = []
    print("| `OMP_WAIT_POLICY` | alone | beside a busy process |\n|---|---|---|")
    for policy in POLICIES:
        alone, beside = (measured(policy, busy) for busy in (False, True))
        rows.append({"policy": policy, "alone_seconds": alone, "beside_seconds": beside})
        print(f"| {policy} | {alone:.1f} s | {beside:.1f} s |", flush=True)
    write_results("busy_machine", {"updates": TIMED, "flags": FLAGS, "rows": rows})


def measured(policy: str, busy: bool) -> float:
    """Seconds of an update, with a thread for every core."""
    environment = os.environ | {"OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(os.cpu_count())}
    with ExitStack() as ends:
        if busy:
            other = ends.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            ends.callback(other.kill)
        command = [sys.executable, "-m", "benchmarks.busy_machine", "--here"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def seconds_of_an_update() -> float:
    """Mean of ``TIMED`` updates after ``WARM_UPS``."""
    from rlr_peft.build import build_run
    from rlr_peft.config import load_config
    from rlr_peft.training import take_update

    run = build_run(load_config(FLAGS))
    for step in range(WARM_UPS):
        take_update(run, step)
    started = time.perf_counter()
    for step in range(WARM_UPS, WARM_UPS + TIMED):
        take_update(run, step)
    return (time.perf_counter() - started) / TIMED


if __name__ == "__main__":
    main()
