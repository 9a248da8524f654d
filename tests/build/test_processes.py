"""What processes agree on when they start."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlr_peft.build import build_run
from rlr_peft.config import ConfigError, load_config
from tests.programs import Program
from tests.training.runs import config_file, of_two_processes

PROGRAM = """
import sys
import torch
from rlr_peft.config import load_config
from rlr_peft.build.run import _accelerator

accelerator = _accelerator(load_config(["--config", sys.argv[1]]))
group = torch.distributed.group.WORLD
print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""


MEETING = """
import os, signal, sys, time
from accelerate import Accelerator
from rlr_peft.build import processes
processes.BEAT, processes.FIRST_WORD, processes.SILENT = 0.1, 1.0, 0.7
from rlr_peft.build.reporting import set_up_logging

set_up_logging()
group = processes.Processes(Accelerator(cpu=True))
rank = int(os.environ["RANK"])
assert group.broadcast({"k": rank}, "the choice") == {"k": 0}
assert group.gather_objects([rank], "the ranks") == [0, 1] and group.largest(rank, "the largest") == 1
if rank == 1:
    with group.doing("thinking"):
        time.sleep(2.5)
group.gather_objects([], "the thoughts")
if rank == int(sys.argv[1]):
    with group.doing("update 7"):
        time.sleep(0.3)
        print("frozen", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
try:
    with group.doing("update 7"):
        group.gather_objects([], "the rewards")
except processes.ProcessLostError as error:
    sys.exit(f"error: {error}")
"""


@contextmanager
def meeting(frozen: int) -> Iterator[tuple[Program, Program]]:
    """Two processes, of which the first holds the store by which they find each other; one freezes in update 7."""
    main, peer = (Program(["-c", MEETING, str(frozen)], os.environ | process) for process in of_two_processes())
    try:
        yield main, peer
    finally:
        for process in (main, peer):
            process.kill()
            process.communicate()


def test_a_frozen_process_is_told_of_though_it_holds_what_the_others_meet_by() -> None:
    with meeting(frozen=0) as (main, peer):
        assert peer.stderr is not None
        assert main.stdout.readline() == "frozen\n"
        said = next(line for line in peer.stderr if line.startswith("Process 1 has waited"))
        assert f"for process 0 (id {main.pid} on {socket.gethostname()}), which has given no sign of life for" in said


def test_who_waits_long_says_for_whom_and_who_loses_another_says_which() -> None:
    with meeting(frozen=1) as (main, peer):
        assert main.stderr is not None
        name = rf"process 1 \(id {peer.pid} on {re.escape(socket.gethostname())}\)"
        said = iter(line for line in main.stderr if line.startswith(("Process", "error")))
        alive = rf"Process 0 has waited \d s in starting, at the exchange of the thoughts, for {name}, which is alive, "
        assert re.fullmatch(alive + r"in thinking\.\n", next(said))
        assert "has waited 2 s" in next(said), "ever more rarely"
        assert peer.stdout.readline() == "frozen\n"
        frozen = rf"in update 7, at the exchange of the rewards, for {name}, which has given no sign of life for \d s"
        assert re.search(frozen, next(line for line in said if "no sign of life" in line))
        peer.kill()
        lost = next(line for line in said if line.startswith("error"))
        assert re.match(
            rf"error: Process 0 stopped in update 7, at the exchange of the rewards: {name} has ended", lost
        )
        assert "--resume_from_checkpoint latest" in lost and "Traceback" not in "".join(said)
        assert main.wait(30) == 1


CALIBRATION = """
import json, os, sys
import torch
from rlr_peft.config import load_config
from rlr_peft.build.run import build_run
from rlr_peft.training.update import calibrate

run = build_run(load_config(["--config", sys.argv[1]]))
calibrate(run, 0)
os.write(1, f"energies {json.dumps(run.estimator.statistics.energies.tolist())}\\n".encode())  # in one piece
run.processes.close()
"""


def test_all_processes_go_by_the_main_ones_calibration(workplace: Path, tmp_path: Path) -> None:
    """Sums on GPUs differ in their last digits; here the processes' rewards differ outright."""
    own = tmp_path / "own.py"
    own.write_text(
        "import os\n\ndef own(images, prompts):\n    return images.mean((1, 2, 3)) * (1 + int(os.environ['RANK']))\n"
    )
    config = config_file(workplace, tmp_path / "out", reward_fn=f"{own}:own", gradient_accumulation_steps=1)
    processes = [Program(["-c", CALIBRATION, config], os.environ | process) for process in of_two_processes()]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    energies = [re.findall(r"energies (\[.*\])", output) for output, _ in said]
    assert energies[0] == energies[1] and len(energies[0]) == 1


def test_the_others_wait_for_a_long_evaluation_of_the_main_process(workplace: Path, tmp_path: Path) -> None:
    """With torch's own limit of ten minutes on GPUs, an evaluation that takes longer would end the run."""
    group = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    words = ["-c", PROGRAM, config_file(workplace, tmp_path / "out")]
    output, errors = Program(words, os.environ | group | {"ACCELERATE_USE_CPU": "1"}).communicate(timeout=60)
    assert float(output.split()[-1]) >= 3600, errors


WHO = """
import os
print(*(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")), flush=True)
"""


def test_the_launchers_configs_make_a_group_of_one_or_several_machines(tmp_path: Path) -> None:
    script = tmp_path / "who.py"
    script.write_text(WHO)

    def launched(config: str, *flags: str) -> Program:
        words = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{config}.yaml"]
        return Program([*words, *flags, script], os.environ | {"ACCELERATE_USE_CPU": "1"})

    with socket.create_server(("127.0.0.1", 0)) as ports:
        port = str(ports.getsockname()[1])
    machines = [launched("several_machines", "--machine_rank", rank, "--main_process_port", port) for rank in "01"]
    one = launched("several_gpus", "--main_process_port", "0")
    said = [process.communicate(timeout=120)[0].split("\n")[:-1] for process in (*machines, one)]
    assert said[:2] == [[f"0 0 2 {port}"], [f"1 0 2 {port}"]]
    assert {line.rsplit(" ", 1)[0] for line in said[2]} == {"0 0 2", "1 1 2"}


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_sharding_that_would_do_nothing_is_refused(sharding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    with pytest.raises(ConfigError, match=f"got {sharding}, which would share out nothing here.*--shard_denoiser"):
        build_run(load_config(["--config", "tiny_shapes"]))
