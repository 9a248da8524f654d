"""Every random draw of a run is a pure function of the seed and of what it is for, so a resumed run repeats it.

What libraries draw from the global generators is repeated by their states, as plain tensors and lists.
"""

import random
from typing import Any, Literal, get_args

import numpy
import torch
from numpy.random import SeedSequence

from rlr_peft.errors import UserError

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
]
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


class RandomStatesError(UserError, RuntimeError):
    """States of generators that this process does not have."""


def derive_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """A seed in 0..2**62 - 1 that differs for every purpose and key, such as (step, sample)."""
    state = SeedSequence([seed, _PURPOSES.index(purpose), *key]).generate_state(2)
    return (int(state[0]) << 32 | int(state[1])) >> 2


def capture_random_states(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, and of the CUDA device's if `device` is one.

    The result holds only what `torch.load(weights_only=True)` reads.
    """
    python_version, python_words, python_gauss = random.getstate()
    of_numpy: Any = numpy.random.get_state(legacy=True)
    if of_numpy[0] != "MT19937":
        raise ValueError(f"NumPy's global generator must be MT19937 to be saved; got {of_numpy[0]}.")
    _, numpy_words, position, has_gauss, cached_gauss = of_numpy
    states = {
        "python": [python_version, list(python_words), python_gauss],
        "numpy": [numpy_words.tolist(), int(position), int(has_gauss), float(cached_gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Puts the generators where `capture_random_states` found them.

    Raises:
        RandomStatesError: `device` is a CUDA device, but the states were captured without one.
    """
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda and "cuda" not in states:
        raise RandomStatesError(
            f"The saved random states have no CUDA generator, but this process runs on {device}: "
            "resume on the kind of device that the checkpoint was written on, or start a new run."
        )
    python_version, python_words, python_gauss = states["python"]
    random.setstate((python_version, tuple(python_words), python_gauss))
    numpy_words, position, has_gauss, cached_gauss = states["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(numpy_words, dtype=numpy.uint32), position, has_gauss, cached_gauss))
    # clones: torch crashes on a state that is a view into a larger tensor
    torch.set_rng_state(states["torch"].clone())
    if on_cuda:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)
