"""What hostile and slow clients cost `rlr-peft serve-reward` at its default limits; `docs/rewards.md` quotes it.

`python -m benchmarks.server_limits` (two minutes, 4 GB, Linux) writes `benchmarks/results/server_limits.json`.
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import urllib3
from PIL import Image

from benchmarks.machine import most_resident, write_results

POOL = urllib3.PoolManager(retries=False, maxsize=20)


def png(size: tuple[int, int], pixels: bytes | None = None) -> str:
    """A black image, or one of these pixels, in base64."""
    file = io.BytesIO()
    image = Image.new("RGB", size) if pixels is None else Image.frombytes("RGB", size, pixels)
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def request(*images: str) -> bytes:
    """The body of a request."""
    return json.dumps({"prompt": ["a"] * len(images), "image": images}).encode()


SMALL = request(png((64, 64)))


def ask(url: str, body: bytes) -> tuple[int, float]:
    """Status of the answer, and seconds until it was there."""
    begun = time.monotonic()
    return POOL.request("POST", url, body=body).status, time.monotonic() - begun


def peak_gib(process: "subprocess.Popen[str]") -> float:
    """The most memory that the process has had so far."""
    return round(most_resident(process.pid) / 2**30, 2)


def eight_large_bodies(url: str) -> dict[str, object]:
    """Eight clients that send 250 MB each, and one that sends small requests meanwhile."""
    body, statuses, waits = b'{"prompt": ["a"], "image": ["' + b"A" * 250_000_000 + b'"]}', [], []
    threads = [threading.Thread(target=lambda: statuses.append(ask(url, body)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        waits.append(ask(url, SMALL)[1])
        time.sleep(0.05)
    return {"statuses": sorted(statuses), "longest_wait_of_others": round(max(waits), 2)}


def slow_clients(url: str, number: int = 800) -> float:
    """The longest wait of small requests while so many clients send one byte a second, in seconds."""
    parts, done = urlsplit(url), threading.Event()
    slow: list[socket.socket] = []
    waits: list[float] = []

    def drip() -> None:
        while not done.wait(1):
            for connection in list(slow):
                try:
                    connection.send(b" ")
                except OSError:
                    slow.remove(connection)

    thread = threading.Thread(target=drip)
    thread.start()
    for count in range(number):
        connection = socket.create_connection((parts.hostname, parts.port))
        connection.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 100000\r\n\r\n{")
        slow.append(connection)
        if count % 100 == 99:
            waits.append(ask(url, SMALL)[1])
    done.set()
    thread.join()
    return round(max(waits), 2)


def main() -> None:
    """Every case in turn, since the peak of memory only grows."""
    command = [sys.executable, "-m", "rlr_peft", "serve-reward", "--reward", "jpeg-compressibility", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip().rpartition(" ")[2]
    ask(url, SMALL)
    results: dict[str, object] = {"gib_at_rest": peak_gib(process)}
    bomb = request(*[png((8000, 5000))] * 4)
    results["four_of_40_megapixels"] = {"megabytes": round(len(bomb) / 1e6, 1), "status": ask(url, bomb)[0]}
    results["gib_after_four_of_40_megapixels"] = peak_gib(process)
    results["eight_of_250_megabytes"] = eight_large_bodies(url)
    results["gib_after_eight_of_250_megabytes"] = peak_gib(process)
    results["longest_wait_beside_800_slow_clients"] = slow_clients(url)
    status, seconds = ask(url, request(*[png((2048, 2048), os.urandom(3 * 2048**2))] * 16))
    results["sixteen_of_2048_x_2048_of_noise"] = {"status": status, "seconds": round(seconds, 1)}
    results["gib_after_sixteen_of_2048_x_2048_of_noise"] = peak_gib(process)
    process.terminate()
    process.wait()
    print(json.dumps(results, indent=2))
    print(f"Wrote {write_results('server_limits', results)}")


if __name__ == "__main__":
    main()
