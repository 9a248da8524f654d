"""Becomes the programs that tests start: `python -m tests.zygote SOCKET MODULE ...`; `programs.py` asks it.

It imports the modules once and forks for every program, which then finds them imported: importing torch and diffusers
is most of what a short program does. Each is a process of its own, with its own words, environment, folder, output,
signals and exit code.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import sys
from pathlib import Path

ANSWER = struct.Struct("q")


def next_program(control: socket.socket) -> list[str]:
    """Returns in a new process for every program that is asked for: its words. This one ends when nobody can ask."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, files, _, _ = socket.recv_fds(control, 1, 3)
        if not asked:
            os._exit(0)
        if os.fork():
            for file in files:
                os.close(file)
        else:
            control.close()
            return _begin(*files)


def _begin(answers: int, output: int, errors: int) -> list[str]:
    """Returns in a child of this process, which waits for it and answers with its id and its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=answers) as asker:
        program = json.loads(asker.makefile().readline())
        pid = os.fork()
        if pid:
            os.close(output)
            os.close(errors)
            asker.sendall(ANSWER.pack(pid))
            asker.sendall(ANSWER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
            os._exit(0)
    for file, number in ((output, 1), (errors, 2)):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["cwd"])
    return program["words"]


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # what is imported is not looked through again, in no program
    first, *others = next_program(socket.socket(fileno=int(sys.argv[1])))
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *others[1:]], ""
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = others, os.getcwd()
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *others], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")
