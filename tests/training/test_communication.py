"""What the processes of a run send each other in an update: once an adapter's gradient, and little else."""

import json
import os
import subprocess
from pathlib import Path

from tests.programs import Program
from tests.training.runs import build, config_file, finish, of_two_processes

# What every process hands to each collective of torch, in bytes, update by update.
COUNTED = """
import json, sys
import torch
from torch.distributed import distributed_c10d as collectives
from rlr_peft.build import build_run
from rlr_peft.config import load_config
from rlr_peft.training import take_update

sent = []

def counted(name, argument):
    collective = getattr(collectives, name)

    def count(*arguments, **named):
        sent.append((name, arguments[argument].nbytes))
        return collective(*arguments, **named)

    setattr(collectives, name, count)
    setattr(torch.distributed, name, count)

for name, argument in (("all_reduce", 0), ("all_gather", 1), ("all_gather_into_tensor", 1), ("broadcast", 0)):
    counted(name, argument)
run = build_run(load_config(["--config", sys.argv[1]]))
updates = []
for step in range(2):
    sent.clear()
    take_update(run, step)
    updates.append(list(sent))
run.processes.close()
if run.accelerator.is_main_process:
    open(sys.argv[2], "w").write(json.dumps(updates))
run.accelerator.end_training()
"""


def test_an_update_sends_the_adapters_gradient_once_and_little_else(workplace: Path, tmp_path: Path) -> None:
    config, sent = config_file(workplace, tmp_path / "out", estimator="full-bp"), tmp_path / "sent.json"
    words = ["-c", COUNTED, config, sent]
    processes = [Program(words, os.environ | each, stderr=subprocess.STDOUT) for each in of_two_processes()]
    for process in processes:
        finish(process)
    gradient = sum(parameter.numel() * parameter.element_size() for parameter in build(config).chain.parameters)
    for update in json.loads(sent.read_text()):
        reduced = [size for name, size in update if name == "all_reduce"]
        others = [size for name, size in update if name != "all_reduce"]
        assert reduced == [gradient]
        assert len(others) <= 16 and sum(others) < 8192, others
