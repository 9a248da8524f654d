"""Fuzz: damaged and odd files, flags, answers and requests; each must be accepted, or refused in one clear sentence.

    python -m benchmarks.fuzz --minutes 60                     # all targets, an equal share of the time for each
    python -m benchmarks.fuzz --minutes 2 --target adapters
    python -m benchmarks.fuzz --target adapters --seed 17      # one input again, with its traceback
    python -m benchmarks.fuzz --anew                           # forgets what results/fuzz.json counts

An input is made from its target and its seed alone; seeds go on where the results file ends. Every target runs in a
process of its own, whose memory and time are limited. A finding is

- an exception that is no `UserError`, or one whose message is long, or has several lines that are no list;
- an input that takes more than `LIMIT` seconds, or more than `MEMORY` bytes above what the process began with;
- the end of the process;
- a file opened for writing, a folder or a name changed outside the input's folder, a program started, or a connection
  to another machine;
- what a target itself finds wrong, such as a damaged checkpoint that passes for whole.

It needs no network and one processor core. Writes ``benchmarks/results/fuzz.json``.
"""

import argparse
import logging
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.fuzz_inputs import FindingError, Target
from benchmarks.fuzz_targets import TARGETS
from rlr_peft.errors import UserError
from rlr_peft.foreign_text import printable

LIMIT = 30.0  # seconds for one input
STARTING = 120.0  # seconds for a target to get ready
MEMORY = 1536 * 2**20
LONGEST_LINE = 1500  # characters of a message
MOST_FINDINGS = 20  # listed of each target, with different words; all are counted
COUNTS = ("inputs", "accepted", "refused", "findings")


@dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Attributes:
        seed: which makes the input again.
        kind: "accepted", "refused" or "findings", as the counts are called.
        words: of a finding, its last line.
    """

    seed: int
    kind: str
    words: str = ""


class Fence:
    """Notes what is written outside a folder, and what is started or asked elsewhere; for the life of the process."""

    _CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    _STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")

    def __init__(self, folder: Path) -> None:
        self._inside = str(folder.resolve())
        self.found: list[str] = []
        sys.dont_write_bytecode = True
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._check_path("opened for writing", path)
        elif event in self._CHANGING:
            self._check_path(event, arguments[0])
        elif event in self._STARTING:
            self.found.append(f"{event} of {arguments[0]!r:.200}")
        elif event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] != "127.0.0.1":
            self.found.append(f"a connection to {arguments[1]!r:.200}")

    def _check_path(self, what: str, path: Any) -> None:
        if isinstance(path, int):
            return
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith((self._inside, "/dev/")):
            self.found.append(f"{what}: {place}")


def judge(target: Target, seed: int, fence: Fence) -> Outcome:
    """Makes an input and sees what comes of it."""
    fence.found.clear()
    kind, words = "accepted", ""
    try:
        kind = "accepted" if target.attempt(random.Random(f"{target.name} {seed}")) else "refused"
    except UserError as error:
        kind, words = "refused", problem_of(error)
    except FindingError as error:
        words = f"{error}"
    except BaseException as error:
        words = traceback.format_exception_only(error)[-1]
    if fence.found:
        words = fence.found[0]
    return Outcome(seed, "findings" if words else kind, " ".join(printable(words).split())[:300])


def problem_of(error: UserError) -> str:
    """What makes an error no clear one, as the programs print it; empty if nothing."""
    said = printable(str(error))
    first, *others = said.split("\n")
    problem = ""
    if not all(line.startswith("- ") for line in others) or "\t" in said:  # a list of problems is clear
        problem = "a message of several lines"
    elif any(len(line) > LONGEST_LINE for line in (first, *others)):
        problem = f"a message of {len(said)} characters"
    elif not first.strip():
        problem = "a message without a word"
    return problem and f"{type(error).__name__}: {problem}: {said[:150]}"


def inputs(target: type[Target], seeds: Iterable[int], limit: float = LIMIT) -> Iterator[Outcome]:
    """The outcome of each input; the process that tries them is started again where one ends or stops it."""
    left = list(seeds) if not isinstance(seeds, range) else seeds
    while left:
        with tempfile.TemporaryDirectory() as folder:
            tried = 0
            for outcome in _of_one_process(target, left, Path(folder), limit):
                tried += 1
                yield outcome
            left = left[tried:]


def _of_one_process(target: type[Target], seeds: Any, folder: Path, limit: float) -> Iterator[Outcome]:
    fork = multiprocessing.get_context("fork")  # nothing needs to be imported again
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_try_all, args=(target, seeds, folder, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(STARTING):
            raise SystemExit(f"{target.name} does not get ready.")
        said = receiver.recv()
        if said:
            raise SystemExit(f"{target.name} does not get ready:\n{said}")
        for seed in seeds:
            if not receiver.poll(limit):
                yield Outcome(seed, "findings", f"not done after {limit:g} s")
                return
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                yield Outcome(seed, "findings", f"the process ended with {process.exitcode}")
                return
    finally:
        process.kill()
        process.join()


def _try_all(target: type[Target], seeds: Iterable[int], folder: Path, sender: Connection) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    logging.disable(logging.CRITICAL)
    try:
        (folder / "given").mkdir()
        os.chdir(folder / "given")
        prepared = target(folder / "given")
        limit_memory()
    except BaseException:
        sender.send(traceback.format_exc())
        return
    sender.send("")
    fence = Fence(folder / "given")
    for seed in seeds:
        sender.send(judge(prepared, seed, fence))


def limit_memory() -> None:
    """Of this process, to what it has now and `MEMORY` more; beyond that allocations fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def repeat(target: type[Target], seed: int) -> None:
    """One input again in this process, with its traceback; its files are left."""
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    prepared = target(folder)
    print(f"The input's files are in {folder}.", flush=True)
    print("accepted" if prepared.attempt(random.Random(f"{target.name} {seed}")) else "refused")


def main() -> None:
    """Tries inputs until the time is over."""
    parser = argparse.ArgumentParser(description="Tries damaged and odd inputs.")
    parser.add_argument("--minutes", type=float, default=60.0, help="of this call, for all its targets together")
    parser.add_argument("--target", choices=list(TARGETS), help="only this one")
    parser.add_argument("--seed", type=int, help="with --target: this one input again, with its traceback")
    parser.add_argument("--anew", action="store_true", help="forget what the results file counts")
    parsed = parser.parse_args()
    if parsed.seed is not None:
        repeat(TARGETS[parsed.target], parsed.seed)
        return
    from benchmarks.machine import read_results, write_results

    results: dict[str, Any] = {} if parsed.anew else read_results("fuzz")
    results.pop("machine", None)
    names = [parsed.target] if parsed.target else list(TARGETS)
    for name in names:
        counts = results.setdefault(name, {**dict.fromkeys(COUNTS, 0), "seconds": 0.0, "found": []})
        before, started = counts["seconds"], time.monotonic()
        deadline = started + 60 * parsed.minutes / len(names)
        written = started
        for outcome in inputs(TARGETS[name], range(counts["inputs"], sys.maxsize)):
            now = time.monotonic()
            count(counts, outcome)
            counts["seconds"] = round(before + now - started, 1)
            if now > written + 20 or now > deadline:
                write_results("fuzz", results)
                written = now
            if now > deadline:
                break
        print(f"{name}: {counts['inputs']} inputs, {counts['findings']} findings", flush=True)
    print(table(results))


def count(counts: dict[str, Any], outcome: Outcome) -> None:
    """One more input of a target."""
    counts["inputs"] += 1
    counts[outcome.kind] += 1
    if outcome.kind == "findings":
        known = {alike(found["words"]) for found in counts["found"]}
        if len(known) < MOST_FINDINGS and alike(outcome.words) not in known:
            print(f"  seed {outcome.seed}: {outcome.words}", flush=True)
            counts["found"].append({"seed": outcome.seed, "words": outcome.words})


def alike(words: str) -> str:
    """The same for most findings of one cause: the first words without numbers."""
    return re.sub("[0-9]+", "N", words)[:60]


def table(results: dict[str, Any]) -> str:
    """The counts as Markdown."""
    lines = ["| target | inputs | accepted | refused | findings | seconds |", "|---|---|---|---|---|---|"]
    for name, counts in results.items():
        lines.append(f"| {name} | {' | '.join(str(counts[key]) for key in (*COUNTS, 'seconds'))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
