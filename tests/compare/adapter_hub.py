"""A Hub of one private repository on the loopback: what `hf_hub_download` asks of it, and no more."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.programs import serving

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@contextmanager
def adapter_hub(repo: str, folder: Path, token: str) -> Iterator[str]:
    """Serves the files of a folder as the branch `main` of a private repository; gives the Hub's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, with_body: bool) -> None:
            prefix = f"/{repo}/resolve/"
            is_listing = self.path.startswith(f"/api/models/{repo}/tree/")
            if not self.path.startswith(prefix) and not is_listing:
                return self._refuse(404, "EntryNotFound")
            if self.headers.get("Authorization") != f"Bearer {token}":
                return self._refuse(401, "RepoNotFound")
            if is_listing:
                return self._list()
            _, _, name = self.path.removeprefix(prefix).partition("/")
            file = folder / name
            if not file.is_file():
                return self._refuse(404, "EntryNotFound")
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def _list(self) -> None:
            files = [
                {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": "0"}
                for path in folder.rglob("*")
            ]
            content = json.dumps(files).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *arguments: object) -> None:
            """Says nothing."""

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}"
