"""The runs that are disturbed, and how what they leave is judged."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos_runs import (
    BETWEEN,
    RewardServer,
    Training,
    clear,
    contents,
    difference,
    pair,
    write_config,
    write_files,
)

LIMIT = 240.0  # seconds after which a run counts as one that does not end


@dataclass
class Event:
    """What was done and what came of it.

    Attributes:
        kind: the disturbance.
        phase: in which it met the run.
        resumed: whether the run finished, after as many starts as it took.
        equal: whether what it left equals what an undisturbed run leaves.
        finding: what was not as it should be; empty if nothing.
        output: the last lines of the run in question.
    """

    kind: str
    phase: str
    resumed: bool = False
    equal: bool = False
    finding: str = ""
    output: str = ""


class Chaos:
    """The runs that are disturbed, and what each leaves undisturbed.

    Args:
        folder: for all files.
        hub: a running loopback Hub.
    """

    def __init__(self, folder: Path, hub: Any) -> None:
        self.hub = hub
        self.server = RewardServer()
        write_files(folder)
        remote = {
            "reward_fn": self.server.address,
            "heldout_reward_fn": None,
            "reward_server_timeout": 3.0,
            "reward_server_retries": 2,
        }
        self.single = write_config(folder, "single", push_to_hub=True, hub_model_id="owner/chaos")
        self.double = write_config(folder, "double")
        self.remote = write_config(folder, "remote", **remote)
        self.expected: dict[Path, dict[str, bytes]] = {}
        self.seconds, self.requests = 0.0, 0
        for config in (self.single, self.double, self.remote):
            self.clear(config)
            started = time.monotonic()
            event = Event("undisturbed", BETWEEN)
            if not self.finish(config, event):
                raise SystemExit(f"The undisturbed run failed:\n{event.finding}\n{event.output}")
            if config == self.single:
                self.seconds = time.monotonic() - started
            self.requests = self.server.asked
            self.expected[config] = self.left(config)

    def clear(self, config: Path) -> None:
        """Nothing of an earlier event is left."""
        clear(config.with_suffix(""))
        self.server.behave()
        shutil.rmtree(self.hub.root / "models" / "owner", ignore_errors=True)

    def start(self, config: Path, **how: Any) -> list[Training]:
        """All processes of a run."""
        return pair(config) if config == self.double else [Training(config, **how)]

    def left(self, config: Path) -> dict[str, bytes]:
        """What a run has left in its folder, and of it on the Hub."""
        found = contents(config.with_suffix(""))
        if config == self.single:
            repository = self.hub.repository("owner/chaos")
            found |= {f"hub/{name}": b"" for name in repository.files("main")}
            adapter = "pytorch_lora_weights.safetensors"
            found[f"hub/{adapter}"] = repository.read(adapter)
        return found

    def finish(self, config: Path, event: Event) -> bool:
        """Starts the run again and waits for its end."""
        trainings = self.start(config)
        for training in trainings:
            if not training.wait(LIMIT):
                event.finding = "the run that should have finished does not end"
            elif training.code != 0:
                event.finding = f"the run that should have finished ended with exit code {training.code}"
            elif "Traceback" in training.output:
                event.finding = "the run finished, and printed a traceback"
            if event.finding:
                event.output = tail(training.output)
                break
        for training in trainings:
            training.kill()
        return not event.finding

    def judge(self, config: Path, event: Event) -> Event:
        """Whether what a disturbed run leaves is what it would have left."""
        event.resumed = True
        words = difference(self.expected[config], self.left(config))
        event.equal = not words
        if words:
            event.finding = f"not what an undisturbed run leaves: {words}"
        return event

    def go_on(self, config: Path, event: Event) -> Event:
        """Starts a run again that was ended, and compares."""
        if not event.finding and self.finish(config, event):
            self.judge(config, event)
        return event


def tail(output: str, lines: int = 15) -> str:
    """The last lines, without those of progress bars."""
    kept = [line for line in output.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    return "\n".join(kept[-lines:])


def must_explain(training: Training, event: Event) -> None:
    """A run that ends by itself says why in one sentence."""
    has_ended = training.wait(LIMIT)
    errors = [line for line in training.output.splitlines() if line.startswith("error: ")]
    if not has_ended:
        event.finding = "does not end"
    elif training.code == 0:
        return
    elif "Traceback" in training.output:
        event.finding = "ended with a traceback"
    elif len(errors) != 1:
        event.finding = f"ended with exit code {training.code} and {len(errors)} sentences that begin with `error: `"
    if event.finding:
        event.output = tail(training.output)
        training.kill()
