"""Real processes, real signals: each test runs a small training loop as a child and signals it."""

import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rlr_peft.build import GracefulInterruption

LOOP = """
import signal, sys, time
from rlr_peft.build import GracefulInterruption

former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
with GracefulInterruption() as interruption:
    for step in range(1, 1000):
        print("start", step, flush=True)
        deadline = time.monotonic() + float(sys.argv[1])
        while time.monotonic() < deadline:
            time.sleep(0.01)
        print("finish", step, flush=True)
        if interruption.exit_code:
            break
    print("checkpoint", step, flush=True)
assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former
sys.exit(interruption.exit_code)
"""


def start_loop(step_seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(step_seconds)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "start 1\n"
    return process


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_finishes_the_step_then_ends_in_order(number: signal.Signals, exit_code: int) -> None:
    process = start_loop(0.5)
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert output.splitlines() == ["finish 1", "checkpoint 1"]
    assert errors.strip() == f"{number.name}: finishing this step, then saving a checkpoint. Ctrl-C now stops at once."
    assert process.returncode == exit_code


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_sigint_after_the_first_signal_stops_at_once(first: signal.Signals) -> None:
    process = start_loop(30)
    assert process.stderr is not None
    process.send_signal(first)
    while "finishing this step" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    assert output == ""
    assert process.returncode != 0


def test_further_sigterms_do_not_cut_the_step_short() -> None:
    process = start_loop(0.5)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert output.splitlines() == ["finish 1", "checkpoint 1"]
    assert process.returncode == 143


def test_without_a_signal_nothing_is_requested_and_handlers_come_back_after_an_error() -> None:
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with contextlib.suppress(KeyError), GracefulInterruption() as interruption:
        assert not interruption.exit_code
        raise KeyError
    assert interruption.exit_code == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former


LAUNCHED = "from rlr_peft.build.processes import stopping_with_launcher\nwith stopping_with_launcher():\n"
LAUNCHED += "".join(f"    {line}\n" for line in LOOP.splitlines())
LAUNCHER = "import subprocess, sys\nsubprocess.Popen(sys.argv[1:]).wait()\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_launcher_alone_is_an_orderly_end_too(number: signal.Signals, tmp_path: Path) -> None:
    """As containers stop programs; `accelerate launch` does not pass the signal on."""
    launcher = tmp_path / "accelerate"
    launcher.write_text(LAUNCHER)
    output, errors = run_launched(launcher, number, lines=5)
    assert output[-1].startswith("checkpoint ")
    assert re.search(r"The launcher \(process \d+\) has ended: stopping as on SIGTERM", errors)


def test_a_shell_that_ends_stops_nothing(tmp_path: Path) -> None:
    """A program behind nohup outlives it on purpose."""
    launcher = tmp_path / "shell"
    launcher.write_text(LAUNCHER)
    output, errors = run_launched(launcher, signal.SIGKILL, lines=12)
    assert not any(line.startswith("checkpoint") for line in output[:12]) and "The launcher" not in errors


def run_launched(launcher: Path, number: signal.Signals, lines: int) -> tuple[list[str], str]:
    """What a loop printed that was started by the launcher, which was sent the signal; at least so many lines."""
    words = [sys.executable, str(launcher), sys.executable, "-c", LAUNCHED, "0.2"]
    process = subprocess.Popen(
        words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    child = psutil.Process(process.pid)
    assert process.stdout.readline() == "start 1\n"
    (child,) = child.children()
    process.send_signal(number)
    process.wait()
    output = []
    for line in process.stdout:  # ends with the orphan
        output.append(line.strip())
        if len(output) >= lines and child.is_running() and launcher.name == "shell":
            child.kill()
    return output, process.stderr.read()
