"""A few hundred damaged and odd inputs of every kind, and whether the fuzzer would notice what it looks for."""

import os
import random
import time
from pathlib import Path

import pytest

from benchmarks.fuzz import inputs
from benchmarks.fuzz_inputs import FindingError, Target
from benchmarks.fuzz_targets import TARGETS
from rlr_peft.errors import LONGEST_LINE, UserError

# As many as take about two seconds.
HOW_MANY = {
    "configs": 15,
    "prompts": 250,
    "adapters": 40,
    "checkpoints": 60,
    "reward-values": 300,
    "reward-answers": 200,
    "server-requests": 150,
}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_acceptance_and_clear_refusals(name: str) -> None:
    outcomes = list(inputs(TARGETS[name], range(HOW_MANY[name])))
    assert len(outcomes) == HOW_MANY[name]
    assert {outcome.kind for outcome in outcomes} == {"accepted", "refused"}, [
        outcome for outcome in outcomes if outcome.kind == "findings"
    ]


class Bad(Target):
    """Does one of the things that are findings, or one of two that are none."""

    name = "bad"

    def attempt(self, chance: random.Random) -> bool:
        match chance.randrange(9):
            case 0:
                raise UserError("one sentence")
            case 1:
                raise UserError("one sentence", "and another")
            case 2:
                raise KeyError("x")
            case 3:
                time.sleep(60)
            case 4:
                os._exit(3)
            case 5:
                bytearray(8 * 2**30)
            case 6:
                Path("../outside").write_text("x")
            case 7:
                os.system("true")
            case 8:
                raise FindingError("not noticed")
        return True


def test_every_kind_of_finding_is_found() -> None:
    done = {seed: random.Random(f"bad {seed}").randrange(9) for seed in range(200)}
    seeds = {kind: seed for seed, kind in done.items()}  # one of each
    words = {outcome.seed: outcome.words for outcome in inputs(Bad, sorted(seeds.values()), limit=1.0)}
    found = {kind: words[seed] for kind, seed in seeds.items()}
    assert found.pop(6).startswith("opened for writing: ")
    assert found == {
        0: "",
        1: "UserError: a message of several lines: one sentence and another",
        2: "KeyError: 'x'",
        3: "not done after 1 s",
        4: "the process ended with 3",
        5: "MemoryError",
        7: "os.system of b'true'",
        8: "not noticed",
    }


def test_a_message_is_one_line_of_bounded_length_whatever_it_repeats() -> None:
    assert str(UserError("expected a name, got 'a\n\tb\x1b[2J'; correct it")) == (
        r"expected a name, got 'a\n\tb\x1b[2J'; correct it"
    )
    long = str(UserError(f"config.yaml: unknown name {'a' * 100_000}; correct it"))
    assert len(long) < LONGEST_LINE
    assert long.startswith("config.yaml: unknown name aaa") and long.endswith("aaa; correct it")
    assert str(UserError("2 problems:", "- one", "- two")) == "2 problems:\n- one\n- two"
