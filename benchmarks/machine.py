"""The machine in words, and results as JSON files that state it."""

import ctypes
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    """Processor, cores, GPU and versions: what a measured number must be read with."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }


def most_resident(process: int | str = "self") -> int:
    """Bytes that a process of Linux had in memory at most."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def return_freed_memory() -> None:
    """Makes the C library of Linux give back what was freed, which is resident otherwise until it is used again."""
    ctypes.CDLL(None).malloc_trim(0)


def read_results(name: str) -> dict[str, Any]:
    """What ``write_results`` wrote; empty if nothing."""
    path = _path(name)
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Writes ``benchmarks/results/{name}.json``, the machine first."""
    path = _path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": describe_machine(), **results}, indent=2) + "\n")
    return path


def _path(name: str) -> Path:
    return Path(__file__).parent / "results" / f"{name}.json"
