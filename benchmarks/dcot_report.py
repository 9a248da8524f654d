"""Tables and pictures of ``benchmarks/dcot.py``: means over seeds with 95 % intervals."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.race_report import interval
from rlr_peft.figures import save_image_grid

ATTRIBUTES = ("shape", "texture")
PICTURES = Path("docs/images")
NUM_PICTURES = 5


def report(finals: list[dict[str, Any]], splits: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """One row per arm over its seeds; prints the tables and draws the pictures.

    Args:
        finals: the runs.
        splits: what the base draws from captions that are split in different ways.
        folder: where the runs left their images.
    """
    by_arm: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(finals, key=lambda run: run["seed"]):
        by_arm[run["arm"]].append(run)
    rows = [_row(arm, runs) for arm, runs in by_arm.items()]
    _print_splits(splits)
    _print_rows(rows)
    _print_differences(by_arm)
    _draw_arms(by_arm, folder)
    _draw_splits(splits, folder)
    return rows


def _row(arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "learning_rate": runs[0]["learning_rate"], "seeds": len(runs)}
    row |= {name: float(numpy.mean([run[name] for run in runs])) for name in ("updates", "cpu_seconds")}
    row["coverage"] = runs[0]["coverage"]
    for when in ("before", "after", "gain"):
        for name in ("reward", *(f"heldout/tiny-shapes-heldout/{attribute}" for attribute in ATTRIBUTES)):
            row |= _mean(f"{name.split('/')[-1]}_{when}", [run[f"{name}_{when}"] for run in runs])
        row |= _mean(f"heldout_{when}", [heldout(run, when) for run in runs])
    return row


def heldout(run: dict[str, Any], when: str) -> float:
    """Sum of both attributes by the judge that nothing is trained against."""
    return float(sum(run[f"heldout/tiny-shapes-heldout/{attribute}_{when}"] for attribute in ATTRIBUTES))


def _mean(name: str, values: list[float]) -> dict[str, float]:
    return {name: float(numpy.mean(values)), f"{name}_interval": interval(numpy.array(values))}


def _print_splits(splits: list[dict[str, Any]]) -> None:
    attributes = [name.removeprefix("tiny-shapes-heldout/") for name in splits[0] if name.startswith("tiny")]
    print(f"| caption | {' | '.join(attributes)} |\n|---{'|---' * len(attributes)}|")
    for row in splits:
        means = [f"{row[f'tiny-shapes-heldout/{name}']:.3f}" for name in attributes]
        print(f"| {row['split']} | {' | '.join(means)} |")
    print()


def _print_rows(rows: list[dict[str, Any]]) -> None:
    print("| arm | learning rate | updates | CPU s | reward | gain | held out | gain | shape | texture |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        numbers = [
            f"{row['learning_rate']:g}",
            f"{row['updates']:.0f}",
            f"{row['cpu_seconds']:.0f}",
            *(
                text
                for name in ("reward", "heldout")
                for text in (
                    f"{row[f'{name}_before']:.3f} → {row[f'{name}_after']:.3f}",
                    f"{row[f'{name}_gain']:+.3f} ± {row[f'{name}_gain_interval']:.3f}",
                )
            ),
            *(f"{row[f'{name}_before']:.3f} → {row[f'{name}_after']:.3f}" for name in ATTRIBUTES),
        ]
        print(f"| {row['arm']} | {' | '.join(numbers)} |")
    print()


def _print_differences(by_arm: dict[str, list[dict[str, Any]]]) -> None:
    """Held-out scores of the arms, paired by seed: the same prompts and noises."""
    window = next(arm for arm in by_arm if arm.startswith("DCoT, window"))
    for first, second in (("DCoT", "plain"), ("contrast", "plain"), (window, "DCoT")):
        for what in ("gain", "after"):
            values = numpy.array(
                [heldout(a, what) - heldout(b, what) for a, b in zip(by_arm[first], by_arm[second], strict=True)]
            )
            print(f"held-out {what}, {first} minus {second}: {values.mean():+.3f} ± {interval(values):.3f}")


def _draw_arms(by_arm: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Rows: prompts; columns: plain base and adapter, the same of DCoT, adapters of a contrast and with a window; one
    seed."""
    window = next(arm for arm in by_arm if arm.startswith("DCoT, window"))
    seed = by_arm["plain"][0]["seed"]
    shown = {
        arm: torch.load(folder / "pictures" / f"{arm} seed {seed}.pt", weights_only=True)
        for arm in ("plain", "DCoT", "contrast", window)
    }
    columns = [("plain", "before"), ("plain", "after"), ("DCoT", "before"), ("DCoT", "after")]
    columns += [("contrast", "after"), (window, "after")]
    images, captions = [], []
    for i in range(NUM_PICTURES):
        for arm, when in columns:
            images.append(shown[arm][when][i])
            captions.append(f"{arm}, {'base' if when == 'before' else 'adapter'}: {shown[arm]['prompts'][i]}")
    save_image_grid(PICTURES / "dcot.png", torch.stack(images), captions, columns=len(columns))


def _draw_splits(splits: list[dict[str, Any]], folder: Path) -> None:
    """Rows: prompts; columns: ways to split them; the base alone."""
    shown = torch.load(folder / "pictures" / "base splits.pt", weights_only=True)
    images = [shown["images"][row["split"]][i] for i in range(NUM_PICTURES) for row in splits]
    captions = [f"{row['split']}: {shown['prompts'][i]}" for i in range(NUM_PICTURES) for row in splits]
    save_image_grid(PICTURES / "dcot_splits.png", torch.stack(images), captions, columns=len(splits))
