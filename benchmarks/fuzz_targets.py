"""What is fuzzed: targets make inputs from a random generator and give them to the program; here those of rewards."""

import base64
import http.client
import json
import random
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.fuzz_files import Adapters, Checkpoints, Configs, Prompts
from benchmarks.fuzz_inputs import TEXTS, FindingError, Target, as_json, bent, damaged, odd
from rlr_peft.rewards import (
    CallableReward,
    JpegReward,
    RemoteReward,
    RemoteSettings,
    RewardServer,
    ServerLimits,
    measure_images,
    request_body,
)


class Returned(Target):
    """What a user's reward may return."""

    name = "reward-values"

    def attempt(self, chance: random.Random) -> bool:
        value = self._value(chance)

        def reward(images: Tensor, prompts: list[str]) -> Any:
            return value

        images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        images.requires_grad_(chance.random() < 0.5)
        scored = measure_images(CallableReward("r", reward), images, ["a cat", chance.choice(TEXTS[:5]) + "dog"])
        if scored.scores.shape != (2,) or not scored.scores.isfinite().all():
            raise FindingError(f"scores {scored.scores}")
        return True

    def _value(self, chance: random.Random) -> Any:
        class Rude:
            """Raises whatever is asked of it."""

            def __getattr__(self, name: str) -> Any:
                raise chance.choice([KeyError, RuntimeError, RecursionError])(name * chance.choice([1, 1000]))

            def __repr__(self) -> str:
                return self.anything

        shape = chance.choice([(2,), (2, 1), (1, 2), (), (0,), (3,), (2, 2)])
        number = torch.full(shape, chance.choice([0.5, 1e38, float("nan"), -float("inf")]))
        dtypes = [torch.float64, torch.complex64, torch.bool, torch.int8, torch.bfloat16, torch.uint8]
        makers: list[Callable[[], Any]] = [
            lambda: odd(chance),
            lambda: [odd(chance, 3), odd(chance, 3)],
            lambda: number.to(chance.choice(dtypes)),
            lambda: number.to_sparse() if number.ndim else number,
            lambda: number.to("meta"),
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
            lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            lambda: number.requires_grad_(),
            lambda: list(number) if number.ndim else [number, number],
            lambda: numpy.array([odd(chance, 3), odd(chance, 3)], dtype=object),
            lambda: numpy.array(["1", "2"]),
            lambda: numpy.ma.masked_array([1.0, 2.0], [True, False]),
            lambda: Rude(),
            lambda: [Rude(), Rude()],
            lambda: (number, Rude()),
            lambda: (1.0, 2.0),
            lambda: (entry for entry in (1.0, 2.0)),
            lambda: {1.0, 2.0},
            lambda: type("Scores", (list,), {})([1, 2]),
        ]
        value = chance.choice(makers)()
        if chance.random() < 0.3:
            value = ([0.5, 0.25], chance.choice([{"a": value}, {odd(chance, 4): value}, [{"a": value}] * 2, value]))
        return value


class Answers(Target):
    """What a reward's server may answer."""

    name = "reward-answers"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.answer = b""
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with closing(connection), closing(connection.makefile("rb")) as asked:
                try:
                    length = 0
                    while (line := asked.readline()) not in (b"\r\n", b""):
                        if line.lower().startswith(b"content-length:"):
                            length = int(line.split(b":")[1])
                    asked.read(length)
                    connection.sendall(self.answer)
                except OSError:
                    continue

    def attempt(self, chance: random.Random) -> bool:
        sound = {"rewards": [0.5, 0.25], "info": {"a": [1, 2], "b": 3}, "version": "1"}
        body = as_json(bent(sound, chance) if chance.random() < 0.8 else sound, chance)
        status = chance.choice(["200 OK"] * 6 + ["422 No", "500 Error", "302 Found", "204 None", "999 \x1b[2J"])
        length = len(body) if chance.random() < 0.9 else chance.choice([0, 1, 10**30, -1, "x"])
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
        if chance.random() < 0.1:
            head += chance.choice(
                ["Content-Encoding: gzip", "Transfer-Encoding: chunked", "Retry-After: x", "a" * 70000]
            )
            head += "\r\n"
        self.answer = head.encode() + b"Connection: close\r\n\r\n" + body
        if chance.random() < 0.15:
            self.answer = damaged(self.answer, chance)
        reward = RemoteReward(f"http://127.0.0.1:{self.port}/", RemoteSettings(timeout=2, retries=0))
        scored = measure_images(reward, torch.zeros(2, 3, 4, 4), ["a cat", "a dog"])
        if scored.scores.shape != (2,) or not scored.scores.isfinite().all():
            raise FindingError(f"scores {scored.scores}")
        return True


class Requests(Target):
    """What may be sent to `serve-reward`, which must answer in JSON, never with 500, and go on."""

    name = "server-requests"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        limits = ServerLimits(max_pixels=1_000_000, max_waiting_bytes=20_000_000, request_timeout=1.0)
        self.server = RewardServer(JpegReward(compressible=True), "127.0.0.1", 0, limits=limits)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.sound = request_body(images, ["a cat", "a dog"], [{"a": 1}, {}])

    def attempt(self, chance: random.Random) -> bool:
        body = dict(self.sound)
        if chance.random() < 0.6:
            body["image"] = [self._image(chance), *body["image"][1:]]
        if chance.random() < 0.6:
            body = bent(body, chance)
        content = as_json(body, chance)
        headers = {}
        if chance.random() < 0.05:
            headers["Content-Length"] = chance.choice(["x", "-1", "9" * 30, "0", str(len(content) // 2)])
        status, answer = self._ask("POST", content, headers)
        if status == 200 and not all(isinstance(score, float) for score in answer["rewards"]):
            raise FindingError(f"200 with {answer!r:.200}")
        alive, _ = self._ask("GET", b"", {})
        if alive != 200:
            raise FindingError(f"the server answers {alive} afterwards")
        return status == 200

    def _ask(self, method: str, content: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.server_address[1], timeout=20)) as connection:
            connection.request(method, "/", content, headers)
            response = connection.getresponse()
            said = response.read()
        if not (200 <= response.status < 300 or 400 <= response.status < 500 or response.status == 503):
            raise FindingError(f"the server answers {response.status}: {said!r:.200}")
        try:
            return response.status, json.loads(said)
        except ValueError:
            raise FindingError(f"the server answers {response.status} without JSON: {said!r:.200}") from None

    def _image(self, chance: random.Random) -> str:
        """A PNG with odd chunks whose checksums are right, or a damaged one."""
        content = base64.b64decode(self.sound["image"][0])
        chunks, at = [], 8
        while at < len(content):
            (length,) = struct.unpack(">I", content[at : at + 4])
            chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
            at += length + 12
        for _ in range(chance.randrange(3)):
            place = chance.randrange(len(chunks))
            kind, data = chunks[place]
            if chance.random() < 0.3:
                kind = chance.choice([b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"eXIf", b"gAMA"])
                data = zlib.compress(bytes(10**6)) if chance.random() < 0.3 else data
                chunks.insert(chance.randrange(len(chunks) + 1), (kind, b"a\0\0" + data))
            else:
                chunks[place] = (kind, damaged(data, chance))
        made = content[:8]
        for kind, data in chunks:
            made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        return base64.b64encode(damaged(made, chance) if chance.random() < 0.2 else made).decode()


TARGETS: dict[str, type[Target]] = {
    kind.name: kind for kind in (Configs, Prompts, Adapters, Checkpoints, Returned, Answers, Requests)
}
