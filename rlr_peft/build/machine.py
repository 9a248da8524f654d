"""What a run's numbers depend on besides its config: hardware, versions of packages, and the seeds of its draws."""

import math
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

import torch
from numpy.random import SeedSequence

from rlr_peft.config import ConfigError, ModelArguments

WITHOUT_GPU = (
    "bnb_quantization_config_path: expected a GPU, which bitsandbytes' quantised layers need, got a machine without "
    "one; run on a GPU or leave --bnb_quantization_config_path out."
)
OFFLOAD_WITHOUT_GPU = "offload: expected a GPU, whose memory it spares, got a machine without one; leave --offload out."
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "rlr-peft")


def describe_hardware(device: torch.device, num_processes: int = 1) -> str:
    """For example ``1 x NVIDIA H200`` or ``2 CPU cores (x86_64)``."""
    if device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def total_memory(device: torch.device) -> int | None:
    """Bytes of the GPU, or of the host's memory; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    return None if any(name not in os.sysconf_names for name in names) else math.prod(map(os.sysconf, names))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB (2**20 bytes): of the GPU's allocator, or of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide whether a resumed run repeats bit for bit."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def prepare_machine(arguments: ModelArguments, device: torch.device) -> None:
    """Refuses, before any download, what this machine cannot do, and chooses the kernels of the whole process.

    Raises:
        ConfigError: an option that needs a GPU on a machine without.
    """
    if device.type == "cpu":
        if arguments.bnb_quantization_config_path is not None:
            raise ConfigError(WITHOUT_GPU)
        if arguments.offload:
            raise ConfigError(OFFLOAD_WITHOUT_GPU)
    if device.type == "cuda":
        # cuDNN's attention fails in the backward pass of FLUX in bf16 (torch 2.11, H200); flash attention does not.
        # Who names it as attention_backend gets it all the same.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if arguments.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if arguments.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when the process first uses it
        torch.use_deterministic_algorithms(True)


Purpose = Literal[
    "lora",
    "samples",
    "calibration",
    "estimator",
    "validation",
    "evaluation",
    "process",
    "divergence",
    "reward_scale",
    "learning_rate",
    "noise_window",
]
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def derive_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """A seed in 0..2**62 - 1 that differs for every purpose and key, such as (step, sample)."""
    state = SeedSequence([seed, _PURPOSES.index(purpose), *key]).generate_state(2)
    return (int(state[0]) << 32 | int(state[1])) >> 2
