"""A reward server that misbehaves in one way per path; a process of its own, standard library only.

Prints its port. `GET /asked/PATH` answers how often PATH was asked to score.
"""

import base64
import json
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

asked: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send(200, asked[self.path.removeprefix("/asked")])

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked[self.path] += 1
        first = asked[self.path] == 1
        count = len(request["prompt"])
        good = {"rewards": [float(len(prompt)) for prompt in request["prompt"]], "info": {"count": count}}
        match self.path.partition("?")[0]:
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
            case "/wrong-count":
                self.send(200, {"rewards": [1.0]})
            case "/nan":
                self.send(200, {"rewards": [float("nan")] * count})
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

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
