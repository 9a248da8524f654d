"""A reward server that misbehaves in one way per path; a process of its own, standard library only.

Prints its port. `GET /asked/PATH` answers how often PATH was asked to score.
"""

import base64
import gzip
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

asked: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send(200, asked[self.path.removeprefix("/asked")])

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.path.partition("?")[0]
        asked[path] += 1
        first = asked[path] == 1
        prompts = request.get("prompt", [])
        count = len(prompts)
        info = {"count": count, "port": self.client_address[1]}
        good = {"rewards": [float(len(prompt)) for prompt in prompts], "info": info}
        match path.removesuffix("/chat/completions").removesuffix("/again"):
            case "/good" | "/batches":
                self.send(200, good)
            case "/slow-once":
                time.sleep(1.5 if first else 0)
                self.send(200, good)
            case "/slow":
                time.sleep(1.5)
            case "/500-once":
                self.send(500, {"error": "warming up"}) if first else self.send(200, good)
            case "/503-retry-after":
                self.send(503, {"error": "busy"}, {"Retry-After": "1"}) if first else self.send(200, good)
            case "/503-retry-soon":
                self.send(503, {"error": "busy"}, {"Retry-After": "soon"}) if first else self.send(200, good)
            case "/503-retry-date":
                date = formatdate(time.time() + 2, usegmt=True)  # whole seconds: one or two
                self.send(503, {"error": "busy"}, {"Retry-After": date}) if first else self.send(200, good)
            case "/503-retry-day":
                self.send(503, {"error": "busy"}, {"Retry-After": "86400"}) if first else self.send(200, good)
            case "/429-once":
                self.send(429, {"error": "too many"}) if first else self.send(200, good)
            case "/500":
                self.send(500, {"error": "out of memory"})
            case "/reset-once" if first:
                self.close_connection = True
                self.connection.close()
            case "/reset-once":
                self.send(200, good)
            case "/404":
                self.send(404, {"error": "no such reward"})
            case "/422":
                self.send(422, {"error": "cannot judge this prompt"})
            case "/redirect":
                self.send(302, {}, {"Location": "/good"})
            case "/redirect-away":
                self.send(307, {}, {"Location": f"http://localhost:{self.server.server_address[1]}/stolen"})
            case "/echo":
                self.send(404, {"error": f"there is nothing at {self.path}", "headers": str(self.headers)})
            case "/wrong-count":
                self.send(200, {"rewards": [1.0]})
            case "/nan":
                self.send(200, {"rewards": [float("nan")] * count})
            case "/nan-text":
                self.send(200, {"rewards": ["NaN"] * count})
            case "/long-number":
                self.send(200, {"rewards": [10**400] * count, "info": {"count": 10**400}})
            case "/endless-number":
                self.send(200, b'{"rewards": [' + b"1" * 6000 + b"]}")
            case "/twice":
                self.send(200, b'{"rewards": [1, 2, 3], "rewards": [3, 2, 1]}')
            case "/deep":
                self.send(200, b'{"rewards": ' + b"[" * 100_000)
            case "/nested":
                self.send(200, b'{"rewards": [' + b'{"a": ' * 400 + b"1" + b"}" * 400 + b", 1, 1]}")
            case "/latin":
                self.send(200, b'{"rewards": [1, 2, 3], "info": "\xe9"}')
            case "/text":
                self.send(200, {"rewards": ["good"] * count})
            case "/no-rewards":
                self.send(200, {"scores": [1.0] * count})
            case "/list":
                self.send(200, [1.0] * count)
            case "/scalar":
                self.send(200, {"rewards": 1.0, "info": 2.0})
            case "/odd-info":
                self.send(200, good | {"info": [1.0] * count})
            case "/half":
                self.send(200, b'{"rewards": [', {"Content-Length": "100"})
                self.close_connection = True
            case "/cut":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
                self.close_connection = True
            case "/short-length":
                self.send(200, good, {"Content-Length": "13"})
            case "/long-length":
                self.send(200, good, {"Content-Length": "1000000000000"})
                self.drip()
            case "/drip-body":
                self.send(200, b"[", {"Content-Length": "1000"})
                self.drip()
            case "/drip-headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Header: ")
                self.drip()
            case "/interim":
                self.drip(b"HTTP/1.1 100 Continue\r\n\r\n")
            case "/huge":
                self.send(200, b" " * (17 * 2**20))
            case "/zipped":
                self.send(200, gzip.compress(b" " * (17 * 2**20), 1), {"Content-Encoding": "gzip"})
            case "/locked":
                expected = "Basic " + base64.b64encode(b"me:p@ss").decode()
                right = self.headers["Authorization"] == expected
                self.send(200, good) if right else self.send(401, {"error": "who are you?"})
            case "/html":
                self.send(200, b"<html>Welcome to the proxy</html>")

    def send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(data)
        except ConnectionError:  # the client that was kept waiting has left
            self.close_connection = True

    def drip(self, drop: bytes = b" ") -> None:
        """As long as anyone waits for it."""
        try:
            while True:
                self.wfile.write(drop)
                time.sleep(0.05)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running() -> Iterator[str]:
    """The server in a process of its own; gives its address."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
