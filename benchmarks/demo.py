"""Publishes what `make demo` measured: its numbers with the machine, and its figures, for the README.

    make demo && python -m benchmarks.demo

Writes ``benchmarks/results/demo.json`` and copies the figures to ``docs/images/``.
"""

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.machine import write_results

FIGURES = ("before_after.png", "reward_curve.png")


def main() -> None:
    """Copies numbers and figures of a finished demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="folder of the finished demo")
    parser.add_argument("--name", default="demo", help="of the results; figures are copied for `demo` alone")
    arguments = parser.parse_args()
    metrics = json.loads((arguments.output_dir / "metrics.json").read_text())
    images = Path("docs/images")
    images.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES if arguments.name == "demo" else ():
        shutil.copy(arguments.output_dir / figure, images / f"demo_{figure}")
    path = write_results(arguments.name, {"metrics": metrics})
    for name in ("reward", "heldout", "reward/all_right", "heldout/all_right"):
        before, after, gain = (metrics[f"{name}_{part}"] for part in ("before", "after", "gain"))
        ratio = gain / metrics[f"{name}_gain_se"]
        print(f"{name}: {before:.4f} -> {after:.4f}, gain {gain:+.4f} = {ratio:+.1f} paired standard errors")
    print(path)


if __name__ == "__main__":
    main()
