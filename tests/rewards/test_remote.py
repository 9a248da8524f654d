"""Reward servers over loopback, in processes of their own: the protocol, and every fault of the documentation."""

import base64
import io
import json
import pickle
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import urllib3
from PIL import Image

from rlr_peft import json_server
from rlr_peft.errors import RewardError
from rlr_peft.rewards import (
    JpegReward,
    RemoteReward,
    RemoteSettings,
    RewardSettings,
    Term,
    WeightedRewards,
    WireError,
    load_reward,
    measure_images,
    read_request,
    request_body,
    score_images,
)
from tests.programs import Program, completed
from tests.rewards.faulty_server import running

PROMPTS = ["one", "three", "eleven"]
SETTINGS = RemoteSettings(timeout=0.5, retries=2, backoff=0.01)
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "rewards.md"


@dataclass(frozen=True)
class Fault:
    """A row of the documentation's table.

    Attributes:
        path: of the faulty server; empty for a port where nobody listens.
        what: the fault.
        happens: what happens then.
        message: what the error says; empty where scoring goes on.
        asked: how often the server is asked, with two retries.
    """

    path: str
    what: str
    happens: str
    message: str
    asked: int


RETRIED, GIVEN_UP, AT_ONCE = "asked again, then scored", "stops after the retries", "stops at once"
DRIPS = "gave no answer in 3 tries of 0.5 s each: TimeoutError: the answer was not whole after 0.5 s"
FAULTS = [
    Fault("slow-once", "one answer comes too late", RETRIED, "", 2),
    Fault("500-once", "500, then well", RETRIED, "", 2),
    Fault("503-retry-after", "503 with `Retry-After: 1`, then well", "waits as told, " + RETRIED, "", 2),
    Fault("503-retry-date", "503 with a date in `Retry-After`, then well", "waits as told, " + RETRIED, "", 2),
    Fault("503-retry-soon", "503 with `Retry-After: soon`, then well", RETRIED, "", 2),
    Fault("429-once", "429, then well", RETRIED, "", 2),
    Fault("reset-once", "the connection breaks, then well", RETRIED, "", 2),
    Fault("slow", "no answer in time, ever", GIVEN_UP, "gave no answer in 3 tries of 0.5 s each", 3),
    Fault("drip-body", "an answer that comes byte by byte, for ever", GIVEN_UP, DRIPS, 3),
    Fault("drip-headers", "headers that come byte by byte, for ever", GIVEN_UP, DRIPS, 3),
    Fault("interim", "100 Continue, for ever", GIVEN_UP, DRIPS, 3),
    Fault("long-length", "a `Content-Length` beyond the answer, which stays away", GIVEN_UP, DRIPS, 3),
    Fault("500", "500 for ever", GIVEN_UP, "answered 500 Internal Server Error after 3 tries", 3),
    Fault("", "dead: nobody listens", GIVEN_UP, "gave no answer in 3 tries", 0),
    Fault("404", "404", AT_ONCE, 'answered 404 Not Found: {"error": "no such reward"}', 1),
    Fault("422", "422, the reward refuses", AT_ONCE, "answered 422 Unprocessable", 1),
    Fault("redirect", "redirect", AT_ONCE, "answered 302 Found", 1),
    Fault("wrong-count", "one score for three images", AT_ONCE, "expected scores of shape (3,), got (1,)", 1),
    Fault("nan", "NaN", AT_ONCE, "expected finite scores, got nan", 1),
    Fault("nan-text", "NaN as a text", AT_ONCE, "expected numbers, got 'NaN' at position 0", 1),
    Fault("long-number", "numbers of 400 digits", AT_ONCE, "or a list of 3 numbers, got list ([1000000", 1),
    Fault("endless-number", "a number of 6000 digits", AT_ONCE, 'answered no JSON but {"rewards": [111', 1),
    Fault("text", "scores that are text", AT_ONCE, "expected numbers, got 'good' at position 0", 1),
    Fault("no-rewards", "no `rewards` in the answer", AT_ONCE, "expected a JSON object with `rewards`, got", 1),
    Fault("list", "a bare list", AT_ONCE, "expected a JSON object with `rewards`, got [1.0", 1),
    Fault("html", "HTML, as of a proxy", AT_ONCE, "answered no JSON but <html>Welcome", 1),
    Fault("deep", "JSON nested 100,000 deep", AT_ONCE, 'answered no JSON but {"rewards": [[[', 1),
    Fault("nested", "objects in place of scores", AT_ONCE, "expected numbers, got {'a': {'a': {", 1),
    Fault("latin", "no UTF-8", AT_ONCE, "answered no JSON but {", 1),
    Fault("twice", "`rewards` twice", AT_ONCE, "answered an object with the key 'rewards' twice", 1),
    Fault("short-length", "a `Content-Length` within the answer", AT_ONCE, 'answered no JSON but {"rewards": [', 1),
    Fault("huge", "17 MiB", AT_ONCE, "answered more than 16 MiB", 1),
    Fault("zipped", "17 MiB, compressed to 17 kB", AT_ONCE, "answered more than 16 MiB", 1),
    Fault("cut", "half a header, ever", GIVEN_UP, "gave no answer in 3 tries", 3),
    Fault("half", "half an answer, ever", GIVEN_UP, "gave no answer in 3 tries", 3),
    Fault("scalar", "one number for all images", AT_ONCE, "expected scores of shape (3,), got ()", 1),
]


def start(*command: str, stderr: Any = subprocess.STDOUT) -> tuple[Program, str]:
    """A server process, and the first line that it prints."""
    process = Program(command, stderr=stderr)
    return process, process.stdout.readline().strip()


def stop(process: Program) -> None:
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def faulty() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The reference server with a real reward."""
    process, line = start("-m", "rlr_peft", "serve-reward", "--reward", "jpeg-compressibility", "--port", "0")
    assert line.startswith("Serving jpeg-compressibility at http://127.0.0.1:")
    yield line.rpartition(" ")[2]
    stop(process)


def images(count: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, 3, size, size, generator=generator) * 255).round() / 255


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.path or "dead" for fault in FAULTS])
def test_faults(faulty: str, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{faulty}/{fault.path}?key=letmein"
    if not fault.path:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    reward = RemoteReward(url, SETTINGS if fault.happens != AT_ONCE else replace(SETTINGS, timeout=10))
    if fault.message:
        with pytest.raises(RewardError) as caught:
            score_images(reward, images(), PROMPTS)
        message = str(caught.value)
        assert fault.message in message
        assert reward.name in message and "object at 0x" not in message and "letmein" not in message
        assert len(message) < 700 and "\n" not in message
    else:
        assert score_images(reward, images(), PROMPTS).tolist() == [3.0, 5.0, 6.0]
    if fault.path:
        asked = urllib3.request("GET", f"{faulty}/asked/{fault.path}").json()
        assert asked == fault.asked
    assert "Traceback" not in caplog.text and "letmein" not in caplog.text


def fault_table() -> str:
    """As it stands in the documentation: what the error says is what `test_faults` has seen it say."""
    rows = [(fault, f"`{fault.message.replace('`', '')} ...`" if fault.message else "none") for fault in FAULTS]
    head = "| fault | what happens | the error |\n|---|---|---|\n"
    return head + "\n".join(f"| {fault.what} | {fault.happens} | {message} |" for fault, message in rows)


def test_the_documentation_holds_this_table() -> None:
    assert fault_table() in DOCUMENTATION.read_text(encoding="utf-8")


def test_images_travel_in_batches_and_info_comes_back(faulty: str) -> None:
    reward = RemoteReward(f"{faulty}/batches", RemoteSettings(batch_size=2))
    scored = measure_images(reward, images(), PROMPTS)
    assert scored.scores.tolist() == [3.0, 5.0, 6.0]
    assert scored.info["count"].tolist() == [2.0, 2.0, 1.0]
    assert len(set(scored.info["port"].tolist())) == 1, "over one connection"
    assert urllib3.request("GET", f"{faulty}/asked/batches").json() == 2


def test_info_of_another_form_is_left_out(faulty: str) -> None:
    assert measure_images(RemoteReward(f"{faulty}/odd-info", SETTINGS), images(), PROMPTS).info == {}


def test_metadata_that_is_no_json_is_named(faulty: str) -> None:
    metadata = [{"day": date(2020, 1, 1)}] * 3
    with pytest.raises(RewardError, match=r"Object of type date is not JSON.* leave such columns out of --metadata"):
        score_images(RemoteReward(f"{faulty}/good", SETTINGS), images(), PROMPTS, metadata)


def test_a_user_name_and_a_password_are_sent_and_not_told(faulty: str) -> None:
    address = faulty.replace("http://", "http://me:p%40ss@")
    assert score_images(RemoteReward(f"{address}/locked", SETTINGS), images(), PROMPTS).tolist() == [3.0, 5.0, 6.0]
    for wrong in (f"{faulty}/locked", f"{address.replace('ss@', 's@')}/locked?token=p%40ss"):
        with pytest.raises(RewardError, match="answered 401 Unauthorized: ") as caught:
            score_images(RemoteReward(wrong, SETTINGS), images(), PROMPTS)
        assert "p%40s" not in str(caught.value) and "p@s" not in str(caught.value)


def test_a_server_that_repeats_the_address_tells_no_secret_of_it(faulty: str) -> None:
    address = faulty.replace("http://", "http://me:p%40ss@")
    with pytest.raises(RewardError, match=r"answered 404 Not Found: .*nothing at /echo\?token=\*\*\*&n=1") as caught:
        score_images(RemoteReward(f"{address}/echo?token=letmein&n=1", SETTINGS), images(), PROMPTS)
    assert "letmein" not in str(caught.value) and "p@ss" not in str(caught.value)


def test_a_redirect_takes_no_password_elsewhere(faulty: str) -> None:
    address = faulty.replace("http://", "http://me:p%40ss@")
    with pytest.raises(RewardError, match="answered 307 Temporary Redirect"):
        score_images(RemoteReward(f"{address}/redirect-away", SETTINGS), images(), PROMPTS)
    assert urllib3.request("GET", f"{faulty}/asked/stolen").json() == 0


def test_a_long_wait_is_cut_and_every_wait_is_announced(
    faulty: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert json_server.MAX_RETRY_AFTER_SECONDS == 300
    monkeypatch.setattr(json_server, "MAX_RETRY_AFTER_SECONDS", 0.1)
    for path in ("503-retry-day", "429-once/again", "reset-once/again"):
        assert score_images(RemoteReward(f"{faulty}/{path}", SETTINGS), images(), PROMPTS).tolist() == [3.0, 5.0, 6.0]
    host = faulty.removeprefix("http://")
    told, busy, broken = [record.getMessage() for record in caplog.records]
    assert told == (
        f"{host}/503-retry-day answered 503 Service Unavailable with Retry-After '86400', which is cut to 0.1 s: "
        "asking again in 0.1 s (try 2 of 3)."
    )
    assert busy == f"{host}/429-once/again answered 429 Too Many Requests: asking again at once (try 2 of 3)."
    assert broken.startswith(f"{host}/reset-once/again gave no answer (") and broken.endswith(
        "again at once (try 2 of 3)."
    )


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        (None, 0),
        ("7", 7),
        (" 7 ", 7),
        ("soon", 0),
        ("-5", 0),
        ("1e3", 0),
        ("", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Fri, 99 Xyz 99999999 99:99:99 GMT", 0),
        ("9" * 5000, 0),
    ],
)
def test_any_retry_after_is_a_number_of_seconds(told: str | None, seconds: float) -> None:
    assert json_server._seconds(told) == seconds


def test_a_server_that_does_not_read_is_not_waited_for() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        server = json_server.JsonServer(f"http://127.0.0.1:{deaf.getsockname()[1]}/", 0.3, retries=0, backoff=0)
        start_time = time.monotonic()
        with pytest.raises(json_server.NoAnswerError, match=r"gave no answer in 1 tries of 0\.3 s each: TimeoutError"):
            server.ask({"image": "A" * 20_000_000})
        assert time.monotonic() - start_time < 2


def test_the_reference_server_scores_as_the_reward_itself_does(served: str) -> None:
    reward = load_reward(served, settings=RewardSettings(remote=RemoteSettings(batch_size=2)))
    assert not reward.differentiable
    expected = score_images(JpegReward(compressible=True), images(), PROMPTS)
    pixels = images().requires_grad_(True)
    scores = score_images(reward, pixels, PROMPTS)
    assert torch.equal(scores, expected) and not scores.requires_grad


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'["\xff"]', "expected JSON"),
        (b"1" * 6000, "expected JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}", "`prompt`: expected a list of texts"),
        (b'{"prompt": ["a"]}', "`image`: expected a list"),
        (b'{"prompt": ["a"], "image": []}', "got 1, 0 and 1"),
        (b'{"prompt": [], "image": []}', "one or more"),
        (b'{"prompt": ["a"], "image": ["bm8="]}', "`image` 0: expected a base64 PNG"),
        (b'{"prompt": ["a"], "image": ["!"]}', "`image` 0: expected a base64 PNG"),
        (b'{"prompt": ["a"], "image": ["bm8="], "metadata": [1]}', "`metadata`: expected a list of objects"),
    ],
)
def test_the_reference_server_refuses_what_is_malformed(served: str, body: bytes, message: str) -> None:
    answer = urllib3.request("POST", served, body=body)
    assert answer.status == 400
    assert message in answer.json()["error"]


def test_the_reference_server_takes_images_of_different_sizes_and_says_what_it_serves(served: str) -> None:
    mixed = [images(1, 16), images(1, 24), images(1, 16)]
    body = {"prompt": PROMPTS, "image": [request_body(image, ["x"], [{}])["image"][0] for image in mixed]}
    rewards = urllib3.request("POST", served, json=body).json()["rewards"]
    expected = [score_images(JpegReward(True), image, ["x"]).item() for image in mixed]
    assert rewards == pytest.approx(expected)
    stated = urllib3.request("GET", served).json()
    assert stated["reward"] == "jpeg-compressibility" and re.fullmatch("[0-9a-f]{16}", stated["version"])
    assert urllib3.request("POST", served, json=body).json() == {"rewards": rewards, **stated}


def test_a_reward_that_refuses_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(images, prompts, metadata):\n"
        "    scores = images.mean((1, 2, 3)) / (0 if prompts[0] == 'bad' else 1)\n"
        "    return scores, {'seen': [entry.get('n', None) for entry in metadata], 'endless': float('inf')}\n"
    )
    process, line = start("-m", "rlr_peft", "serve-reward", "--reward", f"{path}:mine", "--port", "0")
    try:
        reward = RemoteReward(line.rpartition(" ")[2], SETTINGS)
        scored = measure_images(reward, images(2), ["a", "b"], [{"n": 7}, {}])
        assert torch.allclose(scored.scores, images(2).mean((1, 2, 3)), atol=1e-6)
        assert scored.info.keys() == {"seen"} and scored.info["seen"][0] == 7 and scored.info["seen"][1].isnan()
        with pytest.raises(RewardError, match=r"answered 422 .*expected finite scores"):
            score_images(reward, images(2), ["bad", "b"])
    finally:
        stop(process)


def test_a_reward_of_whole_videos_is_not_served() -> None:
    done = completed(["-m", "rlr_peft", "serve-reward", "--reward", "temporal-flicker", "--port", "0"])
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "reward 'temporal-flicker' judges whole videos, but only images travel" in done.stderr


def test_a_request_is_json_and_comes_back_as_it_was() -> None:
    metadata: list[dict[str, Any]] = [{"n": 1}, {}, {"text": "é"}]
    back, prompts, entries = read_request(json.loads(json.dumps(request_body(images(), PROMPTS, metadata))), 10**6)
    assert torch.allclose(torch.stack(back) / 255, images(), atol=1e-6)
    assert (prompts, entries) == (PROMPTS, metadata)


def test_only_png_is_decoded() -> None:
    body = request_body(images(1), ["a"], [{}])
    body["image"] = ["R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="]  # a GIF
    with pytest.raises(WireError, match="expected a base64 PNG"):
        read_request(body, 10**6)


def test_names_hold_no_secrets() -> None:
    assert RemoteReward("https://user:secret@scores.example:8443/v1/?token=secret").name == "scores.example:8443/v1"
    with pytest.raises(RewardError, match="expected http://HOST"):
        RemoteReward("http:///nowhere")


# --- Flow-Factory -----------------------------------------------------------------------------------------------------


class Compute(BaseHTTPRequestHandler):
    """A server as Flow-Factory describes it: scores are the means of green of images or of all frames, and of what the
    images are conditioned on."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/compute" and set(asked) == FIELDS
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        videos = asked["video"] or [[image] for image in asked["image"]]
        conditions = asked["condition_images"] or [[] for _ in videos]
        scores = [
            float(numpy.mean([green(image) for image in (*frames, *given)]))
            for frames, given in zip(videos, conditions, strict=True)
        ]
        body = json.dumps({"rewards": scores}).encode()
        if asked["prompt"][0] == "pickle":
            body = pickle.dumps({"rewards": scores})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


FIELDS = {"prompt", "image", "video", "condition_images", "condition_videos", "extra"}


def green(image: str) -> float:
    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        return float(numpy.asarray(opened.convert("RGB"))[..., 1].mean()) / 255


@pytest.fixture
def compute() -> Iterator[tuple[RemoteReward, list[dict[str, Any]]]]:
    with HTTPServer(("127.0.0.1", 0), Compute) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield RemoteReward(f"http://127.0.0.1:{server.server_port}/compute", SETTINGS), server.asked  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def levels(shape: tuple[int, ...], *values: float) -> torch.Tensor:
    """Images or videos (B, ...) of one grey each, in 255ths."""
    return torch.stack([torch.full(shape, value / 255) for value in values])


def test_flow_factorys_servers_get_images_condition_images_and_columns(compute: Any) -> None:
    reward, asked = compute
    given = request_body(levels((3, 4, 4), 200), ["x"], [{}])["image"]
    metadata = [{"kind": "a", "condition_images": given, "own": 1}, {"kind": "b"}]
    scores = score_images(reward, levels((3, 4, 6), 100, 50), PROMPTS[:2], metadata)
    assert scores.tolist() == pytest.approx([150 / 255, 50 / 255])
    assert asked[0]["prompt"] == PROMPTS[:2] and asked[0]["video"] is None
    assert asked[0]["condition_images"] == [given, []] and asked[0]["extra"] == {"kind": ["a", "b"]}


def test_flow_factorys_servers_get_videos_whole(compute: Any) -> None:
    reward, asked = compute
    video = torch.cat([levels((1, 3, 4, 4), 0, 60), levels((1, 3, 4, 4), 90, 120)], 1)  # frames 0, 90 and 60, 120
    assert score_images(reward, video, PROMPTS[:2]).tolist() == pytest.approx([45 / 255, 90 / 255])
    assert asked[0]["image"] is None and [len(frames) for frames in asked[0]["video"]] == [2, 2]
    both = WeightedRewards([Term(reward, 1.0), Term(load_reward("jpeg-compressibility"), 1.0)])
    assert score_images(both, levels((3, 4, 4), 30), PROMPTS[:1]).shape == (1,), "images will do as well"


def test_a_pickle_is_refused_with_the_reason(compute: Any) -> None:
    with pytest.raises(RewardError, match="answered with a pickle, which is never opened, as it can run any code"):
        score_images(compute[0], levels((3, 4, 4), 30), ["pickle"])
