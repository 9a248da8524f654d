"""What a run prints when it fails, and its exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlr_peft.training.errors import reporting_errors

# Real limits of the operating system: a longer file cannot be written, as on a full disk.
PROGRAM = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from rlr_peft.training.errors import reporting_errors

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with reporting_errors("Go on so."):
    {write}
"""
WRITES = {
    "text": "Path(sys.argv[1]).write_text('x' * 2000)",
    "safetensors": "save_file({'x': torch.zeros(1000)}, sys.argv[1])",
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_full_disk_is_one_message(kind: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", PROGRAM.replace("{write}", WRITES[kind]), str(tmp_path / "file")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert done.stderr.startswith("error: A file could not be written: ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(" Free disk space. Go on so.\n")


def test_a_full_gpu_is_one_message_that_says_what_saves_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, reporting_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nat some kernel")
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: The GPU's memory is full: CUDA out of memory. Tried to allocate 2.00 GiB. Lower ")
    assert "--gradient_checkpointing" in printed and "`rlr-peft plan --gpu_memory GIB`" in printed
    assert printed.count("\n") == 1 and "at some kernel" not in printed


def test_ctrl_c_is_answered_with_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, reporting_errors("All is kept."):
        raise KeyboardInterrupt
    assert left.value.code == 130
    assert capsys.readouterr().err == "Stopped at once. All is kept.\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(FileNotFoundError), reporting_errors():
        Path("/nowhere/at/all").read_text()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), reporting_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
