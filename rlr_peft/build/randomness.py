"""Every random draw of a run is a pure function of the seed and of what it is for, so a resumed run repeats it."""

from typing import Literal, get_args

from numpy.random import SeedSequence

Purpose = Literal[
    "lora",
    "samples",
    "calibration",
    "estimator",
    "validation",
    "evaluation",
    "process",
    "divergence",
    "reward_scale",
    "learning_rate",
    "noise_window",
]
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def derive_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """A seed in 0..2**62 - 1 that differs for every purpose and key, such as (step, sample)."""
    state = SeedSequence([seed, _PURPOSES.index(purpose), *key]).generate_state(2)
    return (int(state[0]) << 32 | int(state[1])) >> 2
