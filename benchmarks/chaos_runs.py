"""Runs of the training script for `benchmarks.chaos`: forked with their imports done, watched, compared.

A thread of a forked run looks at the main thread's stack and tells the phase through shared memory, so that the phase
in which a signal met the run is measured, not guessed; it changes none of the run's numbers.
"""

import base64
import contextlib
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, get_ident
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_rlr_lora.py"
# A phase, and the functions (file.function) that are on the stack in it; the first match counts.
PHASES = {
    "checkpoint": ("resuming.save_checkpoint",),
    "push": ("publisher.finish",),
    "card": ("card.write_card", "card_facts.run_record", "finishing.write_comparison"),
    "adapter check": ("finishing._verify_adapter",),
    "evaluation": ("validation.evaluate_adapter",),
    "base evaluation": ("validation.evaluate_base",),
    "images": ("validation.save_validation_images",),
    "calibration": ("update.calibrate",),
    "update": ("update.take_update",),
    "loading": ("run.build_run", "publisher.open_publisher", "resuming.resume"),
    "figures and numbers": ("finishing.finish",),
}
START, BETWEEN = "before imports", "between phases"
NAMES = [*PHASES, BETWEEN]
# What may differ between a disturbed and an undisturbed run: times, memory, and checksums of files that hold them.
UNCOMPARED = (r"checkpoint-\d+/progress\.pt", r"checkpoint-\d+/manifest\.json", r"\.run\.lock")
VOLATILE = (
    rb'"(seconds|peak_memory_mb)": [\d.e-]+',
    rb'"readme_sha256": "\w+"',
    rb"\| (training time|peak memory) \| [^|]*\|",
    rb"\b[0-9a-f]{40}(-dirty)?",  # the results that this benchmark writes make the working tree dirty
)


class Training:
    """One process of a run.

    Args:
        config: its YAML file.
        environment: variables that it has besides those of this process.
        size_limit: of every file that it writes, in bytes; None for none.
        cold: a fresh interpreter, of which no stack is known, instead of a fork that has its imports done.
    """

    def __init__(
        self,
        config: Path,
        environment: Mapping[str, str] | None = None,
        size_limit: int | None = None,
        *,
        cold: bool = False,
    ) -> None:
        name = f"{config.stem}-{(environment or {}).get('RANK', '0')}"
        self._printed = config.with_name(f"{name}.log")
        self._phases = multiprocessing.RawArray("i", 2 * [NAMES.index(BETWEEN)])
        self._process: Any
        if cold:
            with self._printed.open("wb") as file:
                words = [sys.executable, str(SCRIPT), "--config", str(config)]
                self._process = subprocess.Popen(words, stdout=file, stderr=file, cwd=ROOT)
        else:
            arguments = (config, self._printed, self._phases, dict(environment or {}), size_limit)
            self._process = multiprocessing.get_context("fork").Process(target=_train, args=arguments)
            self._process.start()
        self._is_cold = cold

    @property
    def is_running(self) -> bool:
        return self.code is None

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        code: int | None = self._process.poll() if self._is_cold else self._process.exitcode
        return code

    @property
    def output(self) -> str:
        return self._printed.read_text(errors="replace")

    def phase(self) -> str:
        """What it is at, or was when it ended."""
        return START if self._is_cold else NAMES[self._phases[0]]

    def last_phase(self) -> str:
        """What it was at before it went through its end."""
        return START if self._is_cold else NAMES[self._phases[1]]

    def wait_for(self, phase: str, seconds: float) -> bool:
        """Waits until it is in that phase; False if it ends or the time does before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.is_running or self.phase() == phase:
                return self.is_running
            time.sleep(0.002)
        return False

    def send(self, number: signal.Signals) -> None:
        if self.is_running:
            os.kill(self._process.pid, number)

    def kill(self) -> str:
        """Ends it as `kill -9` does; returns the phase in which that met it."""
        self.send(signal.SIGKILL)
        self.wait(60)
        return self.phase()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within that time."""
        if self._is_cold:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
        else:
            self._process.join(seconds)
        return not self.is_running


def _train(config: Path, printed: Path, phases: Any, environment: dict[str, str], size_limit: int | None) -> None:
    """The forked process."""
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    Thread(target=_tell_phases, args=(phases, get_ident()), daemon=True).start()
    os.environ.update(environment)
    if size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, size_limit))
    sys.argv = [str(SCRIPT), "--config", str(config)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def _tell_phases(phases: Any, main: int) -> None:
    """Looks at the main thread's stack every few milliseconds."""
    while True:
        frame, calls = sys._current_frames().get(main), set()
        while frame is not None:
            calls.add(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
            frame = frame.f_back
        phases[0] = next((i for i, name in enumerate(PHASES) if calls.intersection(PHASES[name])), len(PHASES))
        phases[1] = phases[0] if phases[0] < len(PHASES) else phases[1]
        time.sleep(0.005)


def pair(config: Path) -> list[Training]:
    """A run of two processes that exchange over gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    return [Training(config, common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def import_all() -> None:
    """What the script imports on its way, so that forks have it; a figure loads the fonts."""
    import io

    import matplotlib
    import matplotlib.pyplot
    import pandas  # type: ignore[import-untyped]  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401

    import rlr_peft.publishing.publisher
    import rlr_peft.training.finishing
    import rlr_peft.training.trainer  # noqa: F401
    from tests.pipelines import tiny_stable_diffusion  # noqa: F401

    matplotlib.use("Agg")
    figure = matplotlib.pyplot.figure()
    figure.suptitle("A title")
    figure.savefig(io.BytesIO(), format="png")
    matplotlib.pyplot.close(figure)


def write_files(folder: Path) -> None:
    """A tiny base, prompts and a reward."""
    from diffusers import DDIMScheduler

    from tests.pipelines import tiny_stable_diffusion
    from tests.training.conftest import REWARDS

    pipeline = tiny_stable_diffusion("v_prediction", timestep_spacing="trailing")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    pipeline.save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("red ball\nblue box\ngreen tree\nsky\nsea\n")
    (folder / "unseen.txt").write_text("a cat\na dog\n")
    (folder / "rewards.py").write_text(REWARDS)


def write_config(folder: Path, name: str, **values: object) -> Path:
    """Of a run that goes through every phase; it is resumed by starting it again."""
    config = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "prompt_path": str(folder / "prompts.txt"),
        "evaluation_prompt_path": str(folder / "unseen.txt"),
        "num_evaluation_images": 4,
        "reward_fn": f"{folder / 'rewards.py'}:redness",
        "heldout_reward_fn": "jpeg-compressibility",
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_images_per_prompt": 2,
        "fo_steps": "auto",
        "calibration_samples": 2,
        "calibration_interval": 2,
        "lora_dropout": 0.2,
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
        "validation_prompt": ["red ball"],
        "num_validation_images": 4,  # a row of four is a small file, and one image fills the page
        "validation_steps": 100,
        "report_to": "none",
        "output_dir": str(folder / name),
        "resume_from_checkpoint": "latest",
        **values,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder, without what may differ; files beside them too, so that leftovers show."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = {}
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        if path.suffix in (".md", ".json", ".html"):
            for pattern in VOLATILE:
                content = re.sub(pattern, b"_", content)
        found[name] = b"" if any(re.fullmatch(pattern, name) for pattern in UNCOMPARED) else content
    return found


def difference(expected: Mapping[str, bytes], got: Mapping[str, bytes]) -> str:
    """The first differences in words; empty if there are none."""
    words = [f"{name} is missing" for name in expected if name not in got]
    words += [f"{name} should not be there" for name in got if name not in expected]
    differing = [name for name in expected if name in got and expected[name] != got[name]]
    words += [f"{name} differs{_first_lines(expected[name], got[name])}" for name in differing]
    return "; ".join(words[:5])


def _first_lines(expected: bytes, got: bytes) -> str:
    """The first pair of lines that differ."""
    pairs = zip(expected.splitlines(), got.splitlines(), strict=False)
    first = next(((a, b) for a, b in pairs if a != b), None)
    return "" if first is None else f": {first[0][:200]!r}, {first[1][:200]!r}"


def clear(folder: Path) -> None:
    """Empties a folder, which may be a mount point."""
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class RewardServer:
    """A reward over HTTP that scores by the images' bytes, and misbehaves when told to.

    Attributes:
        fault: what it does to requests, a name of `FAULTS`; None to answer well.
        first, times: the number of the first request that the fault meets, counted from 1, and how many it does.
        asked: requests since it was last set to zero.
    """

    FAULTS = ("drip", "length too long", "length too short", "close in the middle", "close at once", "silence")

    def __init__(self) -> None:
        self.fault: str | None = None
        self.first, self.times, self.asked = 1, 1, 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                images = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["image"]
                owner.asked += 1
                rewards = [zlib.crc32(base64.b64decode(image)) / 2**32 for image in images]
                fails = owner.fault and owner.first <= owner.asked < owner.first + owner.times
                with contextlib.suppress(OSError):  # who was kept waiting has left
                    self.answer(json.dumps({"rewards": rewards}).encode(), owner.fault if fails else None)

            def answer(self, body: bytes, fault: str | None) -> None:
                self.close_connection = True
                if fault == "close at once":
                    return
                if fault == "silence":
                    time.sleep(30)
                    return
                length = len(body) + {"length too long": 100, "length too short": -7}.get(fault or "", 0)
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if fault == "drip":
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.5)
                self.wfile.write(body[: len(body) // 2] if fault == "close in the middle" else body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def behave(self) -> None:
        """From now on, and counts anew."""
        self.fault, self.asked = None, 0
