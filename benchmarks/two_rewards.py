"""Publishes what the recipe of two rewards measured.

    python train_rlr_lora.py --config configs/tiny_shapes_two_rewards.yaml && python -m benchmarks.two_rewards

Writes ``benchmarks/results/two_rewards.json`` and prints the table of ``docs/rewards.md``.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.machine import write_results

ROLES = {"reward": "trained on", "heldout": "held out"}


def markdown(metrics: Mapping[str, float]) -> str:
    """One row per reward: base, adapter and paired gain with its standard error."""
    rows = ["| reward | | base | adapter | paired gain |", "|---|---|---|---|---|"]
    for key in metrics:
        name = key.removesuffix("_gain")
        role, _, reward = name.partition("/")
        if (
            name == key or name == "heldout"
        ):  # the held-out score is that of the first held-out reward, with its own row
            continue
        row = [f"`{reward}`" if reward else "weighted sum, on the first scales", ROLES[role]]
        row += [f"{metrics[f'{name}_before']:.4f}", f"{metrics[f'{name}_after']:.4f}"]
        rows.append(f"| {' | '.join(row)} | {metrics[key]:+.4f} ± {metrics[f'{key}_se']:.4f} |")
    return "\n".join(rows)


def main() -> None:
    """Copies the numbers of a finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/two_rewards"), help="folder of the finished run"
    )
    metrics = json.loads((parser.parse_args().output_dir / "metrics.json").read_text())
    print(f"{markdown(metrics)}\n\n{write_results('two_rewards', {'metrics': metrics})}")


if __name__ == "__main__":
    main()
