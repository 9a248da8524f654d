"""Python programs in processes of their own, whose imports are already made (`zygote.py`); servers in threads."""

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseServer
from threading import Thread
from typing import TextIO, TypeVar

from tests.zygote import ANSWER

ROOT = Path(__file__).parents[1]
# What takes long to import and reads no setting of the Hub's clients.
LIBRARIES = ("torch._dynamo", "torch._inductor.compile_fx", "scipy.stats", "matplotlib.pyplot", "pyarrow.parquet")
# All that training needs; these read where the Hub and its files are when they are imported.
EVERYTHING = ("rlr_peft.training.trainer", "rlr_peft.training.finishing", "diffusers.loaders.lora_pipeline")


class Program:
    """A running `python WORDS`, with the methods of `subprocess.Popen`.

    Args:
        words: as after `python`: a script or `-m MODULE` or `-c CODE`, and what it is given.
        environment: of the process; None: this one's.
        imported: `EVERYTHING` is imported once for every Hub that programs' environments name; `LIBRARIES` alone is
            cheaper where a Hub or a place of its files serves a program or two.
        stderr: PIPE, STDOUT or an open file.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        imported: tuple[str, ...] = EVERYTHING,
        cwd: Path = ROOT,
        stderr: int | TextIO = subprocess.PIPE,
    ) -> None:
        self.words = list(map(str, words))
        self.returncode: int | None = None
        self._answers, answers = socket.socketpair()
        self.stdout, output = _pipe()
        self.stderr: TextIO | None = None
        if stderr == subprocess.PIPE:
            self.stderr, errors = _pipe()
        else:
            errors = os.dup(output if isinstance(stderr, int) else stderr.fileno())
        files = [answers.detach(), output, errors]
        environment = dict(environment or os.environ)
        socket.send_fds(_zygote(imported, _hub_settings(environment) if imported == EVERYTHING else ()), [b"."], files)
        for file in files:
            os.close(file)
        program = {"words": self.words, "environment": environment, "cwd": str(cwd)}
        self._answers.sendall((json.dumps(program) + "\n").encode())
        self.pid = self._answer()

    def _answer(self) -> int:
        (number,) = ANSWER.unpack(self._answers.recv(ANSWER.size, socket.MSG_WAITALL))
        return number

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = self._answer()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.words, timeout or 0)
            self.returncode = self._answer()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as readers:
            texts = readers.map(lambda file: file.read() if file else "", (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            output, errors = texts
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def completed(
    words: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    imported: tuple[str, ...] = EVERYTHING,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """What became of a program that ran to its end, as `subprocess.run` tells it."""
    program = Program(words, environment, imported, cwd)
    output, errors = program.communicate(timeout=300)
    return subprocess.CompletedProcess(program.words, program.wait(), output, errors)


def _pipe() -> tuple[TextIO, int]:
    reading, writing = os.pipe()
    return open(reading, encoding="utf-8", newline=""), writing  # "\r" stays


def _hub_settings(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What the Hub's clients read when they are imported; the token they read anew."""
    return tuple(sorted((k, v) for k, v in environment.items() if k.startswith("HF_") and k != "HF_TOKEN"))


@functools.cache
def _zygote(modules: tuple[str, ...], hub_settings: tuple[tuple[str, str], ...]) -> socket.socket:
    """Where to ask for programs that find these modules imported, with these settings."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), *modules]
    others = {name: value for name, value in os.environ.items() if not hub_settings or not name.startswith("HF_")}
    environment = others | dict(hub_settings)
    subprocess.Popen(words, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    return ours


S = TypeVar("S", bound=BaseServer)


@contextmanager
def serving(server: S) -> Iterator[S]:
    """Inside, a thread answers what the server is asked."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    with server:
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
