"""Where the processes of a run meet: every exchange between them, what a wait that does not end says, and the launcher.

An exchange waits for the slowest process, which may rightly take hours, in an evaluation for example. So whoever waits
says, after a minute and ever more rarely, for whom and what that one is at; and where a process is gone, which.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import PrefixStore, Store, TCPStore

from rlr_peft.errors import UserError

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

# Seconds: between signs of life, until a wait is spoken of, and of silence until a process counts as frozen.
BEAT, FIRST_WORD, SILENT = 5.0, 60.0, 30.0
# How long an ended process may take to vanish after its connections have.
VANISHING = 5.0
# How long processes wait for each other. With torch's own limits (ten minutes on GPUs) a thorough evaluation would end
# the run.
PATIENCE = timedelta(hours=12)
# What a process says in place of the number that it demands.
AT_EXCHANGE, KEEPS_PACE = -1, -2


class ProcessLostError(UserError, RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


class Processes:
    """The processes of a run, seen from this one; every method but `doing` must be called by all of them.

    Args:
        accelerator: knows their number, and connects them.

    Attributes:
        count: how many there are.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes
        self._wait = _Wait()
        self._stack = ExitStack()
        self._watch: _Watch | None = None
        self._give: Callable[[int], None] | None = None
        self._demands: Any = None  # a group of its own on the host, where no GPU is waited for
        if accelerator.num_processes > 1:
            places = gather_object([(socket.gethostname(), os.getpid())])
            self._watch = _Watch(self._wait, accelerator.process_index, places)
            self._stack.enter_context(repeating(BEAT, self._watch.beat))

    def close(self) -> None:
        """Gives no more signs of life; to be called before the connections are closed.

        With things given on demand it waits for the others, which may still demand some.
        """
        self._answer_demands(AT_EXCHANGE, "the end")
        self._stack.close()

    def give_on_demand(self, give: Callable[[int], None]) -> None:
        """From now on processes that wait for others do what these demand.

        Args:
            give: what all processes do together when any of them demands a number, from 0.
        """
        self._demands = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self._give = give

    def demand(self, number: int) -> None:
        """Has all processes give ``number`` now, those at another place of their program too; the one exception to the
        rule that all of them must call."""
        self._round(number, "what the denoiser needs")

    def keep_pace(self) -> None:
        """Where things are given on demand, waits for those that are behind: at one place all demand the same."""
        self._answer_demands(KEEPS_PACE, "the pace")

    @contextmanager
    def doing(self, work: str) -> Iterator[None]:
        """Names what this process is at inside, for those that wait for it: `evaluating the base`."""
        before, self._wait.work = self._wait.work, work
        try:
            yield
        finally:
            self._wait.work = before

    def gather(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """The (N, ...) tensors of all processes, one after the other, (N x processes, ...)."""
        with self._meeting(name):
            gathered: torch.Tensor = self._accelerator.gather(values)
        return gathered

    def sum(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """The sum of all processes' tensors, of their common shape."""
        with self._meeting(name):
            total: torch.Tensor = self._accelerator.reduce(values, reduction="sum")
        return total

    def gather_objects(self, values: list[T], name: str) -> list[T]:
        """The lists of all processes, one after the other; what is in them can be pickled."""
        with self._meeting(name):
            gathered: list[T] = gather_object(values)
        return gathered

    def broadcast(self, value: T, name: str) -> T:
        """What the main process gives, which can be pickled."""
        values = [value]
        with self._meeting(name):
            broadcast_object_list(values)
        return values[0]

    def map(self, function: Callable[[S], T], items: Sequence[S], name: str) -> list[T]:
        """The function's values, in the items' order; every process works out its equal share of them.

        Args:
            function: what it returns can be pickled, and is on the host.
            items: the same in all processes.
            name: what is worked out, for those that wait.
        """
        own = items[self._accelerator.process_index :: self.count]
        with self.doing(name):
            shares = self.gather_objects([[function(item) for item in own]], name)
        return [shares[i % self.count][i // self.count] for i in range(len(items))]

    def largest(self, number: int, name: str) -> int:
        """The largest of the processes' numbers."""
        return int(self.gather(torch.tensor([number], device=self._accelerator.device), name).max())

    def _answer_demands(self, said: int, name: str) -> None:
        """Gives what others demand until all are at an exchange, or for the pace until nobody demands anything."""
        while self._give is not None:
            others = self._round(said, name)
            if all(number == AT_EXCHANGE or (number == KEEPS_PACE == said) for number in others):
                return

    def _round(self, said: int, name: str) -> list[int]:
        """What all processes said; the numbers among it have been given."""
        assert self._give is not None  # as nothing else is demanded
        with self._exchange(name):
            numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            torch.distributed.all_gather(numbers, torch.tensor([said]), group=self._demands)
            heard = [int(number) for number in numbers]
            for number in sorted({number for number in heard if number >= 0}):
                self._give(number)
        return heard

    @contextmanager
    def _meeting(self, name: str) -> Iterator[None]:
        self._answer_demands(AT_EXCHANGE, name)
        with self._exchange(name):
            yield
            if self._watch is not None and self._accelerator.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the exchange itself runs beside this program

    @contextmanager
    def _exchange(self, name: str) -> Iterator[None]:
        if self._watch is None:
            yield
            return
        self._wait.begin(name)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo has no class of its own
            raise ProcessLostError(self._watch.describe_loss(error)) from error
        finally:
            self._wait.end()


@dataclass
class _Wait:
    """What this process is at; the main thread writes, the watching one reads.

    Attributes:
        work: what it does, in words.
        name: what it exchanges, or exchanged last.
        meetings: exchanges that it has entered; the same number is the same exchange in all processes.
        since: when it entered the present one, on the monotonic clock; None outside.
    """

    work: str = "starting"
    name: str = ""
    meetings: int = 0
    since: float | None = None

    def begin(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        self.meetings += 1

    def end(self) -> None:
        self.since = None


@dataclass
class _Peer:
    """What is known of another process; `changed` is when its beats last did, on the monotonic clock."""

    beats: int = 0
    meetings: int = 0
    work: str = "starting"
    changed: float = 0.0

    def is_silent(self) -> bool:
        return time.monotonic() - self.changed > SILENT


class _Watch:
    """Tells the others what this process is at, and says when it waits long, and for whom."""

    def __init__(self, wait: _Wait, index: int, places: list[tuple[str, int]]) -> None:
        self._wait, self._index, self._places = wait, index, places
        self._store = _connect()
        self._exchange: threading.Thread | None = None
        self._beats = 0
        self._said = (0, 0.0)  # meeting, and after how many seconds of it the next word is due
        now = time.monotonic()
        self._peers = {i: _Peer(changed=now) for i in range(len(places)) if i != index}

    def beat(self) -> None:
        """A sign of life, and a word if this process has waited long."""
        self._beats += 1
        wait = self._wait
        meeting, since = wait.meetings, wait.since
        mine = {"beats": self._beats, "meetings": meeting, "work": wait.work}
        if self._exchange is None or not self._exchange.is_alive():
            # In a thread of its own: the store may be held by a process that is frozen, and would stop the words too.
            self._exchange = threading.Thread(target=self._tell_and_listen, args=(mine,), daemon=True)
            self._exchange.start()
        self._exchange.join(1.0)
        if since is None:
            return
        due = self._said[1] if self._said[0] == meeting else FIRST_WORD
        waited = time.monotonic() - since
        if waited >= due:
            self._said = (meeting, 2 * due)
            self._say(meeting, waited)

    def describe_loss(self, error: RuntimeError) -> str:
        """Who is gone, why that may be, and how to go on."""
        gone = self._ended()
        if gone:
            who = f"{' and '.join(map(self._name, gone))} {'has' if len(gone) == 1 else 'have'} ended"
        else:
            who = f"another process cannot be reached ({str(error).splitlines()[0]})"
        return (
            f"Process {self._index} stopped in {self._wait.work}, at the exchange of {self._wait.name}: {who}. Its own "
            "last message, above or in the launcher's log folder, says why; a process without one was killed, for "
            "example because the machine's memory was full. Checkpoints that were saved are complete: mend the cause "
            "and start all processes again with --resume_from_checkpoint latest."
        )

    def _tell_and_listen(self, mine: dict[str, Any]) -> None:
        try:
            self._store.set(str(self._index), json.dumps(mine))
            self._listen()
        except RuntimeError:  # it ends with the process that holds it, which then falls silent
            logger.debug("The processes' common store does not answer.")

    def _listen(self) -> None:
        for index, peer in self._peers.items():
            if not self._store.check([str(index)]):
                continue
            told = json.loads(self._store.get(str(index)))
            if told["beats"] != peer.beats:
                peer.changed = time.monotonic()
            peer.beats, peer.meetings, peer.work = told["beats"], told["meetings"], told["work"]

    def _say(self, meeting: int, waited: float) -> None:
        awaited = {index: peer for index, peer in self._peers.items() if peer.meetings < meeting}
        if any(index < self._index for index in self._peers if index not in awaited):
            return  # one voice is enough: that of the first who waits
        who = [self._describe(index, peer) for index, peer in awaited.items()]
        logger.warning(
            "Process %d has waited %d s in %s, at the exchange of %s, for %s.",
            self._index,
            waited,
            self._wait.work,
            self._wait.name,
            "; ".join(who) or "the exchange itself, in which all processes take part: look at the network",
        )

    def _describe(self, index: int, peer: _Peer) -> str:
        if peer.is_silent():
            silence = time.monotonic() - peer.changed
            return (
                f"{self._name(index)}, which has given no sign of life for {silence:.0f} s, last in {peer.work}: it is "
                "frozen, or gone with its machine; end it, and start all processes again with "
                "--resume_from_checkpoint latest"
            )
        return f"{self._name(index)}, which is alive, in {peer.work}"

    def _name(self, index: int) -> str:
        host, process = self._places[index]
        return f"process {index} (id {process} on {host})"

    def _ended(self) -> list[int]:
        """Processes that are seen to have ended: those of this machine, and where none has, silent ones elsewhere."""
        here = [i for i in self._peers if self._places[i][0] == socket.gethostname()]
        deadline = time.monotonic() + VANISHING
        while time.monotonic() < deadline:
            ended = [i for i in here if not is_running(self._places[i][1])]
            if ended:
                return ended
            time.sleep(0.1)
        return [i for i, peer in self._peers.items() if i not in here and peer.is_silent()]


def _connect() -> Store:
    """A connection of the watching thread's own to the store by which the processes found each other."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return PrefixStore(f"rlr_peft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def repeating(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Inside, a thread of its own calls `action` again and again; it must not raise, and ends with the program."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(seconds):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(seconds + 1)


def is_running(process: int, started: float | None = None) -> bool:
    """Whether a process of this machine lives; with `started`, in seconds since 1970, whether it is still that one."""
    try:
        found = psutil.Process(process)
        # Clocks are set now and then, by which the start of a living process moves a little.
        is_same = started is None or abs(found.create_time() - started) < 5
        return bool(is_same and found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run")


@contextmanager
def stopping_with_launcher() -> Iterator[None]:
    """Inside, the end of the launcher that started this process counts as a SIGTERM, whatever ended it.

    `accelerate launch` of one process does not pass signals on: a training would run on without anybody. Only a
    launcher is watched: a program behind `nohup` outlives its shell on purpose.
    """
    launcher = os.getppid()
    if not _is_launcher(launcher):
        yield
        return
    said = False

    def look() -> None:
        nonlocal said
        if os.getppid() == launcher or said:
            return
        said = True
        os.write(2, f"\nThe launcher (process {launcher}) has ended: stopping as on SIGTERM.\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)

    with repeating(1.0, look):
        yield


def _is_launcher(process: int) -> bool:
    try:
        words = psutil.Process(process).cmdline()[:4]
    except psutil.Error:
        return False
    return any(word in LAUNCHERS or Path(word).name in LAUNCHERS for word in words)
