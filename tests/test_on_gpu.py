"""`benchmarks/on_gpu.sh`: parts that ended are not started again, those that failed or were cut off are."""

import os
import subprocess
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.sh"
PARTS = "sizes updates parts demo runs tests sharded".split()
# In place of Python: writes down what it was asked, fails where it should, sleeps where it should.
STAND_IN = """#!/bin/bash
echo "$*" >> "$ASKED"
[ -e "$SLEEPS" ] && exec sleep 600
[[ "$*" == *"$FAILS"* ]] && exit 1
exit 0
"""


def call(folder: Path, *parts: str, fails: str = "nothing", seconds: int = 500) -> tuple[str, list[str]]:
    """What the script said last, and what it asked Python for."""
    stand_in, asked = folder / "python", folder / "asked"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    asked.unlink(missing_ok=True)
    environment = {"PYTHON": str(stand_in), "ASKED": str(asked), "FAILS": fails, "SLEEPS": str(folder / "sleeps")}
    environment |= {"SCRATCH": str(folder / "scratch"), "SECONDS_AT_MOST": str(seconds)}
    finished = subprocess.run(["bash", SCRIPT, *parts], env=os.environ | environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()[-1], asked.read_text().splitlines() if asked.exists() else []


def test_a_repeated_call_runs_only_what_is_missing(tmp_path: Path) -> None:
    said, asked = call(tmp_path, fails="gpu_parts")
    assert said == "***** still to run: parts"
    assert len(asked) == len(PARTS) + 1  # the demo is two commands
    said, asked = call(tmp_path)
    assert said == "***** all parts are done"
    assert len(asked) == 1 and "benchmarks.gpu_parts" in asked[0]
    assert call(tmp_path) == ("***** all parts are done", [])


def test_a_call_ends_in_time(tmp_path: Path) -> None:
    (tmp_path / "sleeps").touch()
    started = time.monotonic()
    said, asked = call(tmp_path, seconds=7)
    assert time.monotonic() - started < 30
    assert len(asked) == 1 and said == f"***** still to run: {' '.join(PARTS)}"


def test_parts_are_asked_for_by_name(tmp_path: Path) -> None:
    said, asked = call(tmp_path, "tests")
    assert len(asked) == 1 and "pytest" in asked[0] and "tests" not in said
