"""Runs a program with its waits between retries shortened to a hundredth: `impatient.py -m MODULE ...` or `SCRIPT ...`.

Everything else, client, server and connections, is real.
"""

import runpy
import sys
import time

wait = time.sleep
time.sleep = lambda seconds: wait(seconds / 100)

if sys.argv[1] == "-m":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = sys.argv[1:]
    sys.path.insert(0, ".")
    runpy.run_path(sys.argv[0], run_name="__main__")
