"""Several updates on one prefix of the chain: does that pay in fifty steps?

    python -m benchmarks.prefix_reuse --learning_rates 0.004 0.008 --seeds 1 2

The race of `refl` on the coarse reward in fifty steps (`benchmarks.race`), where three updates of four take up the
prompts, the noises and the latents x_13 of the one before them and draw the last thirteen steps alone. So a sample
costs 21 evaluations in place of 58, and an update's prefix is of weights up to three updates old. The package has no
such option, as it gained less. Six minutes of one core a run; `benchmarks/results/prefix_reuse.json`.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import race
from benchmarks.machine import read_results, write_results
from rlr_peft.chain import DenoisingChain, Trajectory
from rlr_peft.training import update

# Updates on one prefix, and the step at which it ends; `refl` looks at one of the last twelve.
UPDATES, LAST_OF_PREFIX = 4, 13
OF_RACE = argparse.Namespace(steps=50, evaluation_steps=None, images=96, budget=12_000.0, experts=1)


def main() -> None:
    """Races every rate with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning_rates", nargs="+", default=["0.004", "0.008"], metavar="RATE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], metavar="SEED")
    parser.add_argument("--folder", type=Path, default=Path("outputs/prefix_reuse"), help="for the base's evaluations")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    parsed.folder.mkdir(parents=True, exist_ok=True)
    for rate in parsed.learning_rates:
        for seed in parsed.seeds:
            with reused_prefixes():
                run = race.race(parsed.folder, "coarse", ("refl", "4", rate), seed, OF_RACE)
            print(rate, seed, *(f"{point['reward_gain']:+.3f}" for point in run["points"]), flush=True)
            write_results("prefix_reuse", {"runs": [*read_results("prefix_reuse").get("runs", []), run]})


@contextmanager
def reused_prefixes() -> Iterator[None]:
    """Inside, updates share their samples' prompts, seeds and first steps."""
    sample_step, sample = update.sample_step, DenoisingChain.sample
    first: dict[tuple[int, ...], Trajectory] = {}

    def sample_group(run: Any, chain: DenoisingChain, step: int, images_per_prompt: int) -> update.Batch:
        with patch.object(DenoisingChain, "sample", sample_rest):
            return sample_step(run, chain, step - step % UPDATES, images_per_prompt)

    def sample_rest(chain: DenoisingChain, prompts: Sequence[Any], seeds: Sequence[int], noises: Any = None) -> Any:
        if tuple(seeds) not in first:
            first.clear()
            first[tuple(seeds)] = sample(chain, prompts, seeds, noises)
            return first[tuple(seeds)]
        return resampled(chain, first[tuple(seeds)])

    with patch.object(update, "sample_step", sample_group):
        yield


def resampled(chain: DenoisingChain, old: Trajectory) -> Trajectory:
    """The same samples, drawn anew from x_13 on."""
    steps = range(LAST_OF_PREFIX, 0, -1)
    drawn = chain._roll(old.prompts, old.latents[LAST_OF_PREFIX], steps, old.noises, old.dropout_seed)
    predicted = torch.stack([step.pred_original_sample for step in drawn.steps]).flip(0)
    return replace(
        old,
        latents=torch.cat([torch.stack(drawn.latents).flip(0), old.latents[LAST_OF_PREFIX:]]),
        pred_original_samples=torch.cat([predicted, old.pred_original_samples[LAST_OF_PREFIX:]]),
    )


if __name__ == "__main__":
    main()
