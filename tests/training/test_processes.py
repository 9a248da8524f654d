"""What processes agree on when they start."""

import os
import subprocess
import sys
from pathlib import Path

from tests.training.runs import config_file

PROGRAM = """
import sys
import torch
from rlr_peft.config import load_config
from rlr_peft.training.run import _accelerator

accelerator = _accelerator(load_config(["--config", sys.argv[1]]))
group = torch.distributed.group.WORLD
print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""


def test_the_others_wait_for_a_long_evaluation_of_the_main_process(workplace: Path, tmp_path: Path) -> None:
    """With torch's own limit of ten minutes on GPUs, an evaluation that takes longer would end the run."""
    group = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    words = [sys.executable, "-c", PROGRAM, str(config_file(workplace, tmp_path / "out"))]
    environment = os.environ | group | {"ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert float(done.stdout.split()[-1]) >= 3600
