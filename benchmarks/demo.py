"""Publishes what `make demo` measured: its numbers with the machine, and its figures, for the README.

    make demo && python -m benchmarks.demo

Writes ``benchmarks/results/demo.json``, copies the figures to ``docs/images/``, and draws the pairs that changed most.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import torch

from benchmarks.machine import write_results
from rlr_peft.build import build_run, evaluation_chain, render
from rlr_peft.config import load_config
from rlr_peft.figures import save_before_after
from rlr_peft.prompt import Prompt
from rlr_peft.training import resume

FIGURES = ("before_after.png", "reward_curve.png")
# Pairs that gained most, and those that lost most, in the figure.
BEST, WORST = 6, 3


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
    if arguments.name == "demo":
        draw_changed_most(arguments.output_dir, images / "demo_changed_most.png")
    path = write_results(arguments.name, {"metrics": metrics})
    for name in ("reward", "heldout", "reward/all_right", "heldout/all_right"):
        before, after, gain = (metrics[f"{name}_{part}"] for part in ("before", "after", "gain"))
        ratio = gain / metrics[f"{name}_gain_se"]
        print(f"{name}: {before:.4f} -> {after:.4f}, gain {gain:+.4f} = {ratio:+.1f} paired standard errors")
    print(path)


def draw_changed_most(output_dir: Path, path: Path) -> None:
    """The pairs whose reward rose most, and below them those whose reward fell most, drawn again."""
    with (output_dir / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    reward = list(rows[0])[3]
    before, after = ([row for row in rows if row["model"] == model] for model in ("base", "adapter"))
    gains = [float(new[reward]) - float(old[reward]) for old, new in zip(before, after, strict=True)]
    order = sorted(range(len(gains)), key=lambda i: -gains[i])
    chosen = [*order[:BEST], *order[-WORST:]]
    prompts, seeds = [before[i]["prompt"] for i in chosen], [int(before[i]["seed"]) for i in chosen]
    words = ["--config", str(output_dir / "config.yaml"), "--report_to", "none", "--resume_from_checkpoint", "latest"]
    config = load_config([*words, "--output_dir", str(output_dir)])
    run = build_run(config)
    chain = evaluation_chain(config, run.chain)
    with torch.no_grad():
        by_base = render(chain, [Prompt(prompt) for prompt in prompts], seeds)  # a fresh adapter changes nothing
        resume(run)
        by_adapter = render(chain, [Prompt(prompt) for prompt in prompts], seeds)
    of_base, of_adapter = ([float(rows_of_model[i][reward]) for i in chosen] for rows_of_model in (before, after))
    save_before_after(path, by_base, by_adapter, prompts, of_base, of_adapter)


if __name__ == "__main__":
    main()
