"""What clients may make `serve-reward` hold and wait for: real sockets against the server in a process of its own."""

import base64
import io
import json
import random
import socket
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch
import urllib3
from PIL import Image

from rlr_peft.rewards import JpegReward, ServerLimits, TooLargeError, WireError, read_request, request_body
from rlr_peft.rewards import server as server_module
from tests.rewards.test_remote import start, stop

REQUEST_TIMEOUT = 1.5
MAX_PIXELS = 10_000


@dataclass(frozen=True)
class Served:
    """The server: its address, its process, and what it writes."""

    url: str
    process: psutil.Process
    log: Path

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection over which this was sent."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        connection = socket.create_connection((parts.hostname, parts.port), timeout=20)
        connection.sendall(sent)
        return connection

    def post(self, body: Any, **headers: str) -> urllib3.BaseHTTPResponse:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return urllib3.request("POST", self.url, body=data, headers=headers, retries=False, timeout=20)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with narrow limits: 0.01 megapixels, bodies of 3 MB in all, and a second and a half to send one."""
    log = tmp_path_factory.mktemp("served") / "log.txt"
    limits = ("--max_megapixels", "0.01", "--max_waiting_megabytes", "3", "--request_timeout", str(REQUEST_TIMEOUT))
    command = ("-m", "rlr_peft", "serve-reward", "--reward", "jpeg-compressibility", "--port", "0", *limits)
    with log.open("w") as file:
        process, line = start(*command, stderr=file)
        yield Served(line.rpartition(" ")[2], psutil.Process(process.pid), log)
        stop(process)
    assert "Traceback" not in log.read_text()


def png(width: int, height: int) -> str:
    """A black image in base64."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


GOOD = {"prompt": ["a"], "image": [png(20, 10)]}


def is_well(served: Served, seconds: float = 5) -> bool:
    """Whether a good request is answered soon."""
    begun = time.monotonic()
    answer = served.post(GOOD)
    expected = JpegReward(compressible=True)(torch.zeros(1, 3, 10, 20), ["a"], [{}])
    return answer.json()["rewards"] == pytest.approx(expected.scores.tolist()) and time.monotonic() - begun < seconds


def head(length: int | str) -> bytes:
    return f"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: {length}\r\n\r\n".encode()


def read(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def test_huge_images_are_refused_before_they_are_decoded(served: Served) -> None:
    assert is_well(served)
    before = served.process.memory_info().rss
    body = {"prompt": ["a"] * 4, "image": [png(8000, 5000)] * 4}
    assert len(json.dumps(body)) < 700_000
    begun = time.monotonic()
    answer = served.post(body)
    assert time.monotonic() - begun < 5
    assert answer.status == 413
    assert answer.json()["error"] == (
        "expected images of at most 0.01 megapixels in a request, got 160.0; send fewer at once "
        "(--reward_server_batch_size) or smaller ones, or start the server with a higher --max_megapixels"
    )
    assert served.process.memory_info().rss - before < 30e6


def test_the_limit_is_that_of_all_images_together() -> None:
    fits = {"prompt": ["a", "b"], "image": [png(100, 60), png(100, 40)]}
    assert [tuple(image.shape) for image in read_request(fits, 10_000)[0]] == [(3, 60, 100), (3, 40, 100)]
    with pytest.raises(TooLargeError, match=r"at most 0\.009999 megapixels in a request, got 0\.0"):
        read_request(fits, 9_999)


def test_a_request_of_the_default_size_fits_the_default_limits() -> None:
    limits = ServerLimits()
    assert limits.max_pixels >= 16 * 2048 * 2048
    noise = torch.rand(1, 3, 256, 256)
    body = json.dumps(request_body(noise, ["a"], [{}]))
    assert len(body) / 256**2 < server_module.BODY_BYTES_OF_PIXEL
    assert limits.max_body_bytes < limits.max_waiting_bytes


def test_what_pil_itself_refuses_is_too_large() -> None:
    file = bytearray(base64.b64decode(png(8, 8)))
    file[16:24] = (30_000).to_bytes(4, "big") * 2  # width and height of the header, whose check sum comes after it
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    with pytest.raises(TooLargeError, match=r"`image` 0: Image size \(900000000 pixels\) exceeds limit"):
        read_request({"prompt": ["a"], "image": [base64.b64encode(file).decode()]}, 10**12)


def test_a_long_request_is_refused_and_its_sender_hears_of_it(served: Served) -> None:
    answer = served.post(b"[" + b"1," * 5_000_000 + b"1]")
    assert answer.status == 413 and answer.headers["Connection"] == "close"
    assert answer.json()["error"].startswith(
        "expected a request of at most 3 MB, got 10.0 MB; send fewer images at once"
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"[" + b"0," * 1_000_001 + b"0]", 413, "expected JSON of at most 1000000 values, got about 1000002"),
        (b"[" * 400_000, 400, "expected JSON"),
        (json.dumps({"prompt": ["a"], "image": [png(30, 30)[:60]]}).encode(), 400, "`image` 0: expected a whole PNG"),
    ],
    ids=["a million values", "deep", "half an image"],
)
def test_json_and_images_of_ill_will_are_refused(served: Served, body: bytes, status: int, message: str) -> None:
    answer = served.post(body)
    assert (answer.status, answer.json()["error"][: len(message)]) == (status, message)


@pytest.mark.parametrize("length", ["", "-1", "+5", "1_0", "ten", "9" * 5000])
def test_a_length_that_is_none_is_refused(served: Served, length: str) -> None:
    assert read(served.connect(head(length))).startswith(b"HTTP/1.1 411 ")


def test_damaged_images_are_the_clients_fault() -> None:
    source = bytearray(base64.b64decode(request_body(torch.rand(1, 3, 8, 8), ["a"], [{}])["image"][0]))
    dice = random.Random(0)
    for _ in range(400):
        damaged = bytearray(source)
        for _ in range(dice.randint(1, 8)):
            damaged[dice.randrange(8, len(damaged))] = dice.randrange(256)
        try:
            images, _, _ = read_request({"prompt": ["a"], "image": [base64.b64encode(damaged).decode()]}, 10**4)
        except WireError:
            continue
        assert images[0].dtype == torch.uint8


def test_more_bodies_than_the_server_holds_are_to_come_again(served: Served) -> None:
    body = json.dumps(GOOD).encode()
    with served.connect(head(2_900_000) + b" " * 2_899_999) as waiting:
        time.sleep(0.3)
        answer = served.post(b" " * 1_000_000 + body)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
        assert answer.json()["error"] == (
            "requests of 3 MB are waiting, which is as much as this server holds; ask again in 2 s, or start it with a "
            "higher --max_waiting_megabytes"
        )
        assert is_well(served), "a small request still fits"
        assert b" 408 " in read(waiting)
    assert served.post(b" " * 1_000_000 + body).status == 200, "what the first one held is given back"


def test_announced_bytes_are_not_held(served: Served) -> None:
    announced = [served.connect(head(2_900_000) + b"{") for _ in range(20)]
    assert served.post(b" " * 1_000_000 + json.dumps(GOOD).encode()).status == 200
    for connection in announced:
        connection.close()


@pytest.mark.parametrize(
    ("sent", "answered"),
    [(b"POST / HT", b""), (head(1000) + b"{", b"408 Request Timeout")],
    ids=["the head", "the body"],
)
def test_a_request_that_drips_is_not_waited_for(served: Served, sent: bytes, answered: bytes) -> None:
    connection, begun, received = served.connect(sent), time.monotonic(), b""
    connection.settimeout(0.1)
    while time.monotonic() - begun < 10:
        try:
            received = connection.recv(65536)
            break
        except TimeoutError:
            connection.send(b" ")
    assert REQUEST_TIMEOUT - 0.2 < time.monotonic() - begun < REQUEST_TIMEOUT + 2
    received += read(connection)
    if answered:
        assert answered in received and b"the request had not arrived after 1.5 s; send fewer images" in received
    else:
        assert received == b""


def test_a_client_that_leaves_in_the_middle_leaves_no_trace(served: Served) -> None:
    for sent in (b"POST", head(1000) + b"{" * 500):
        connection = served.connect(sent)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()  # a reset, as of a process that was killed
    assert is_well(served)


def test_slow_clients_hold_up_nobody(served: Served) -> None:
    sent = (b"POST / HT", b"POST / HTTP/1.1\r\nHost: here\r\nX-Header: ", head(1000) + b"{")
    slow = [served.connect(sent[number % 3]) for number in range(server_module.MAX_CONNECTIONS + 50)]
    assert is_well(served, seconds=2)
    assert served.process.num_threads() < server_module.MAX_CONNECTIONS + 20
    for connection in slow:  # every one comes to an end
        read(connection)
        connection.close()
    assert is_well(served)
