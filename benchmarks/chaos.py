"""Chaos: kills, full disks, read-only folders, lost peers and lying servers at random moments of whole training runs.

    python -m benchmarks.chaos                         # until 100 kills are reached; goes on where it was cut off
    python -m benchmarks.chaos --kills 20 --minutes 5
    python -m benchmarks.chaos --anew --seed 1         # forgets what results/chaos.json counts

Each event disturbs one run of the training script on a tiny pipeline. The run is then started again with the same
command, which says `resume_from_checkpoint: latest`, until it finishes; and what it leaves must equal, byte for byte
and file by file, what an undisturbed run leaves (`chaos_runs.UNCOMPARED` and `VOLATILE` name what may differ: times,
memory and their checksums). A run that ends by itself must say why in one sentence, without a traceback.

Phases are aimed at and measured, see `chaos_runs`. It needs no network and one processor core; to fill a disk it needs
root. Writes ``benchmarks/results/chaos.json``.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos_judge import LIMIT, Chaos, Event, must_explain, tail
from benchmarks.chaos_runs import (
    BETWEEN,
    PHASES,
    ROOT,
    START,
    RewardServer,
    Training,
    import_all,
)

# Seconds until a survivor must have said that its peer is gone, and a waiting process that its peer is frozen.
GONE, FROZEN = 60.0, 150.0
IS_ROOT = os.geteuid() == 0


def killed(chaos: Chaos, chance: random.Random, aim: str) -> Event:
    """`kill -9`, up to twice in one run: the second one meets the resumed run."""
    chaos.clear(chaos.single)
    phase = ""
    for _ in range(chance.choice([1, 1, 1, 2])):
        training = Training(chaos.single, cold=aim == START)
        if aim == START:
            training.wait(chance.uniform(0, 2))
        elif aim:
            training.wait_for(aim, LIMIT)
            training.wait(chance.uniform(0, 0.6) ** 3)
        else:
            training.wait(chance.uniform(0, 0.9 * chaos.seconds))
        met = training.kill()
        phase = phase or met
    return chaos.go_on(chaos.single, Event("killed", phase))


def stopped(chaos: Chaos, chance: random.Random, aim: str) -> Event:
    """SIGTERM or Ctrl-C, which ask for an orderly end."""
    chaos.clear(chaos.single)
    (training,) = chaos.start(chaos.single)
    training.wait_for(aim, LIMIT)
    event = Event("asked to stop", training.phase())
    training.send(chance.choice([signal.SIGTERM, signal.SIGINT]))
    if not training.wait(LIMIT):
        event.finding = "does not end"
    elif "Traceback" in training.output:
        event.finding = "ended with a traceback"
    event.output = tail(training.output) if event.finding else ""
    return chaos.go_on(chaos.single, event)


def full_disk(chaos: Chaos, chance: random.Random, aim: str) -> Event:
    """The disk of the output folder is full at some file: a small tmpfs, or a limit of the files' size."""
    chaos.clear(chaos.single)
    folder = chaos.single.with_suffix("")
    total = sum(len(content) for content in chaos.expected[chaos.single].values())
    event = Event("full disk" if aim else "file size limit", "")
    if aim:
        folder.mkdir(exist_ok=True)
        size = int(total * chance.uniform(0.05, 1.2))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        limit = None if aim else int(10 ** chance.uniform(2, 5.5))
        (training,) = chaos.start(chaos.single, size_limit=limit)
        must_explain(training, event)
        event.phase = training.last_phase() if training.code else "none: it was large enough"
        if aim:
            subprocess.run(["mount", "-o", f"remount,size={100 * total}", str(folder)], check=True)
        return chaos.go_on(chaos.single, event)
    finally:
        if aim:
            subprocess.run(["umount", str(folder)], check=True)


def read_only(chaos: Chaos, chance: random.Random, aim: str) -> Event:
    """Nothing can be made, renamed or deleted in the output folder, from some phase on."""
    chaos.clear(chaos.single)
    folder = chaos.single.with_suffix("")
    folder.mkdir(exist_ok=True)
    protect, release = (["chattr", "+i"], ["chattr", "-i"]) if IS_ROOT else (["chmod", "a-w"], ["chmod", "u+w"])
    event = Event("read-only folder", START)
    try:
        if aim == START:
            subprocess.run([*protect, str(folder)], check=True)
        (training,) = chaos.start(chaos.single)
        if aim != START:
            training.wait_for(aim, LIMIT)
            event.phase = training.phase()
            subprocess.run([*protect, str(folder)], check=True)
        must_explain(training, event)
    finally:
        subprocess.run([*release, str(folder)], check=True)
    return chaos.go_on(chaos.single, event)


def peer_killed(chaos: Chaos, chance: random.Random, aim: str) -> Event:
    """One of two processes is gone: the other must say so and end."""
    chaos.clear(chaos.double)
    both = chaos.start(chaos.double)
    lost = chance.randrange(2)
    both[lost].wait_for(aim, LIMIT)
    both[lost].wait(chance.uniform(0, 0.5) ** 2)
    event, other = Event("peer killed", both[lost].kill()), both[1 - lost]
    if not other.wait(GONE):
        event.finding = f"the other process still waits after {GONE:.0f} s"
        event.output = tail(other.output)
        other.kill()
    else:
        must_explain(other, event)
    return chaos.go_on(chaos.double, event)


def peer_frozen(chaos: Chaos, chance: random.Random, aim: str) -> Event:
    """One of two processes stands still, for a moment or for ever; who waits long must say for whom."""
    chaos.clear(chaos.double)
    both = chaos.start(chaos.double)
    frozen = chance.randrange(2)
    both[frozen].wait_for(aim, LIMIT)
    both[frozen].send(signal.SIGSTOP)
    event, other = Event("peer frozen", both[frozen].phase()), both[1 - frozen]
    for_ever = aim == "update"
    deadline = time.monotonic() + (FROZEN if for_ever else 5)
    while other.is_running and time.monotonic() < deadline and "has waited" not in other.output:
        time.sleep(0.5)
    if for_ever and "has waited" not in other.output:
        event.finding, event.output = f"not a word about it in {FROZEN:.0f} s", tail(other.output)
    if for_ever:
        both[frozen].kill()
        other.wait(GONE)
        must_explain(other, event)
        return chaos.go_on(chaos.double, event)
    both[frozen].send(signal.SIGCONT)
    for training in both:
        must_explain(training, event)
    return event if event.finding else chaos.judge(chaos.double, event)


def bad_server(chaos: Chaos, chance: random.Random, aim: str) -> Event:
    """The reward's server misbehaves for one request, which is asked again, or from some request on."""
    chaos.clear(chaos.remote)
    fault = chance.choice(RewardServer.FAULTS)
    lasting = chance.random() < 0.4
    event = Event(f"server: {fault}{', lasting' if lasting else ''}", "")
    chaos.server.fault, chaos.server.first = fault, chance.randint(1, chaos.requests)
    chaos.server.times = 10**6 if lasting else 1
    (training,) = chaos.start(chaos.remote)
    while training.is_running and chaos.server.asked < chaos.server.first:
        time.sleep(0.01)
    event.phase = training.phase()
    must_explain(training, event)
    if event.finding or training.code:
        chaos.server.behave()
        # An answer that is cut to its stated length is no JSON, which is not asked for again.
        if not lasting and fault != "length too short" and not event.finding:
            event.finding, event.output = "one bad answer ended the run", tail(training.output)
        return chaos.go_on(chaos.remote, event)
    return chaos.judge(chaos.remote, event)


# One round; the aim is a phase, or "" for any moment.
Plan = tuple[Callable[[Chaos, random.Random, str], Event], str]
OTHERS: list[Plan] = [
    (full_disk, "tmpfs"),
    (bad_server, ""),
    (peer_killed, "update"),
    (read_only, "checkpoint"),
    (stopped, "calibration"),
    (full_disk, ""),
    (bad_server, ""),
    (peer_frozen, "calibration"),
    (peer_killed, "calibration"),
    (bad_server, ""),
    (read_only, START),
    (full_disk, "tmpfs"),
    (peer_frozen, "update"),
    (stopped, "update"),
    (bad_server, ""),
    (read_only, "update"),
    (peer_killed, "base evaluation"),
    (full_disk, ""),
    (stopped, "evaluation"),
    (read_only, "images"),
]
AIMS = [START, "checkpoint", "", "update", "calibration", "push", "", "card", "evaluation", "base evaluation"]
AIMS += ["adapter check", "", "figures and numbers", "images", "loading"]


def plan_of(number: int) -> Plan:
    """Event by event: three kills, then something else."""
    rounds, place = divmod(number, 4)
    return OTHERS[rounds % len(OTHERS)] if place == 3 else (killed, AIMS[(3 * rounds + place) % len(AIMS)])


def main() -> None:
    """Runs events until there are enough kills or the time is over."""
    parser = argparse.ArgumentParser(description="Disturbs training runs and compares what they leave.")
    parser.add_argument("--kills", type=int, default=100, help="kills in all, those of earlier calls counted")
    parser.add_argument("--minutes", type=float, default=600.0, help="of this call; the event under way is finished")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--anew", action="store_true", help="forget what the results file counts")
    parsed = parser.parse_args()
    deadline = time.monotonic() + 60 * parsed.minutes
    os.nice(10)
    with tempfile.TemporaryDirectory() as temporary:
        from tests.hub.processes import LoopbackHub

        folder = Path(temporary)
        hub = LoopbackHub(folder / "hub", folder / "home")
        try:
            for name in [name for name in os.environ if name.startswith("HF_")]:
                del os.environ[name]
            settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
            os.environ.update({**hub.environment(), **settings})
            import_all()
            run_events(Chaos(folder, hub), parsed, deadline, folder)
        finally:
            hub.stop()


def run_events(chaos: Chaos, parsed: argparse.Namespace, deadline: float, folder: Path) -> None:
    """Event after event, each written at once."""
    from benchmarks.machine import read_results, write_results

    kept = {} if parsed.anew else read_results("chaos")
    results: dict[str, Any] = {
        name: kept[name] for name in ("seed", "events", "kills", "table", "findings") if name in kept
    }
    if results.get("seed") != parsed.seed:
        results = {"seed": parsed.seed, "events": 0, "kills": 0, "table": {}, "findings": []}
    while results["kills"] < parsed.kills and time.monotonic() < deadline:
        number = results["events"]
        act, aim = plan_of(number)
        results["events"] += 1
        if act is full_disk and aim and not IS_ROOT:
            print("A tmpfs is mounted by root alone: this event is left out.")
            continue
        started = time.monotonic()
        event = act(chaos, random.Random(f"{parsed.seed} {number}"), aim)
        results["kills"] += event.kind in ("killed", "peer killed")
        row = (
            results["table"]
            .setdefault(event.kind, {})
            .setdefault(event.phase, {"events": 0, "resumed": 0, "byte_equal": 0, "findings": 0})
        )
        for name, count in (("events", True), ("resumed", event.resumed), ("byte_equal", event.equal)):
            row[name] += int(count)
        if event.finding:
            row["findings"] += 1
            output = event.output
            for path, name in (
                (str(folder), "FOLDER"),
                (f"{ROOT}/", ""),
                (sys.prefix, "VENV"),
                (sys.base_prefix, "PYTHON"),
            ):
                output = output.replace(path, name)
            words = {"event": number, "kind": event.kind, "phase": event.phase, "finding": event.finding}
            results["findings"].append({**words, "output": output.splitlines()})
        write_results("chaos", results)
        seconds = time.monotonic() - started
        print(f"{number:4d} {seconds:5.1f} s  {event.kind} in {event.phase}: {event.finding or 'equal'}", flush=True)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The counts as Markdown."""
    lines = ["| disturbance | phase | events | finished | byte-equal | findings |", "|---|---|---|---|---|---|"]
    order = [START, *PHASES, BETWEEN]
    for kind, phases in results["table"].items():
        for phase in sorted(phases, key=lambda name: order.index(name) if name in order else -1):
            lines.append(f"| {kind} | {phase} | {' | '.join(str(count) for count in phases[phase].values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
