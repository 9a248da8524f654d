"""The loopback Hub as tests use it: a server process, and programs that talk to it from processes of their own."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tests.hub.store import Repository, Store
from tests.hub.users import USERS
from tests.programs import EVERYTHING, ROOT, completed

OWNER, READER, FINE_GRAINED, OTHER = USERS


class LoopbackHub:
    """A running server.

    Args:
        root: where it keeps repositories and files.
        home: of its clients' files, which every test finds empty: one place, so that imports serve all programs.
    """

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        self.home = home
        self.store = Store(root)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.server", str(root)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._process.stdout is not None
        self.endpoint = self._process.stdout.readline().strip()
        assert self.endpoint, "the loopback Hub did not start"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def fail(self, *faults: dict[str, Any]) -> None:
        """From now on these faults and no others; the list of requests starts anew."""
        self._ask("POST", "/_faults", faults)
        self._ask("DELETE", "/_requests")

    def requests(self, pattern: str = "") -> list[str]:
        """`METHOD PATH` of the requests since the last `fail`."""
        return [request for request in self._ask("GET", "/_requests") if re.search(pattern, request)]

    def repository(self, id_: str, kind: str = "models") -> Repository:
        repository = self.store.find(kind, id_)
        assert repository is not None, f"no repository {id_}"
        return repository

    def _ask(self, method: str, path: str, content: object = None) -> Any:
        request = urllib.request.Request(self.endpoint + path, json.dumps(content).encode(), method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def environment(self, token: str | None = OWNER, **others: str) -> dict[str, str]:
        """Of a process that knows this Hub and can reach no other machine."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # Whatever is not on loopback goes to a proxy that does not exist.
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **({} if token is None else {"HF_TOKEN": token}),
            **others,
        }


def run(
    words: list[str | Path],
    environment: dict[str, str],
    expected_code: int = 0,
    cwd: Path = ROOT,
    imported: tuple[str, ...] = EVERYTHING,
) -> subprocess.CompletedProcess[str]:
    """Runs Python with these words; its output is shown if the exit code is another."""
    done = completed(words, environment, imported, cwd)
    assert done.returncode == expected_code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
