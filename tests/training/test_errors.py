"""What a run prints when it fails, and its exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

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
with reporting_errors():
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
    assert "free disk space and go on with --resume_from_checkpoint latest" in done.stderr


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(FileNotFoundError), reporting_errors():
        Path("/nowhere/at/all").read_text()
