"""What a run prints when it fails, and its exit codes."""

import errno
import os
from pathlib import Path

import pytest
import torch

from rlr_peft.build import attach_adapters, build_chain, check_trajectory, load_pipeline, reporting_errors
from rlr_peft.build import chain as chain_building
from rlr_peft.chain import family_of
from rlr_peft.config import ConfigError, load_config
from rlr_peft.rewards import load_reward
from tests.programs import completed

# Real limits of the operating system: a longer file cannot be written, as on a full disk.
PROGRAM = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from rlr_peft.build.reporting import reporting_errors

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with reporting_errors("Go on so."):
    {write}
"""
WRITES = {
    "text": "Path(sys.argv[1]).write_text('x' * 2000)",
    "safetensors": "save_file({'x': torch.zeros(1000)}, sys.argv[1])",
}


def test_a_warning_of_an_empty_list_is_not_shown() -> None:
    program = """
import sys, torch
from rlr_peft.build.reporting import set_up_logging
from tests.pipelines import tiny_stable_diffusion
vae = tiny_stable_diffusion().vae
vae.to(torch.float32)
print("SILENT FROM HERE", file=sys.stderr, flush=True)
set_up_logging()
vae.to(torch.float32)
vae._keep_in_fp32_modules = ["encoder"]
vae.to(torch.float16)
"""
    before, after = completed(["-c", program]).stderr.split("SILENT FROM HERE\n")
    assert "should be kept in float32: []" in before, "diffusers says it no more: nothing is left to silence"
    assert after.count("\n") == 1 and "kept in float32: ['encoder']" in after


@pytest.mark.parametrize("kind", WRITES)
def test_a_full_disk_is_one_message(kind: str, tmp_path: Path) -> None:
    done = completed(["-c", PROGRAM.replace("{write}", WRITES[kind]), tmp_path / "file"])
    assert done.returncode == 1
    assert done.stderr.startswith("error: A file could not be read or written: ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(" Free disk space. Go on so.\n")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EROFS])
def test_a_folder_that_must_not_be_written_is_one_message(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, reporting_errors("Go on so."):
        raise OSError(number, os.strerror(number), "outputs/validation")
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: A file could not be read or written: ") and "'outputs/validation'" in printed
    assert printed.endswith(" Change who may, or choose another place. Go on so.\n") and printed.count("\n") == 1


def test_a_full_gpu_is_one_message_that_says_what_saves_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, reporting_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nat some kernel")
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: The GPU's memory is full: CUDA out of memory. Tried to allocate 2.00 GiB. Lower ")
    assert "--gradient_checkpointing" in printed and "`rlr-peft plan --gpu_memory GIB`" in printed
    assert printed.count("\n") == 1 and "at some kernel" not in printed


@pytest.mark.parametrize("too_much", ["torch.empty(2**60)", "bytearray(2**60)"])
def test_a_full_host_is_one_message_too(capsys: pytest.CaptureFixture[str], too_much: str) -> None:
    with pytest.raises(SystemExit) as left, reporting_errors():
        eval(too_much)
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: The host's memory is full: ") and printed.count("\n") == 1
    assert "Lower --train_batch_size" in printed


def test_what_no_memory_holds_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "--pretrained_model_name_or_path tiny-shapes --prompt_path tiny-shapes/train --reward_fn tiny-shapes".split()
    )

    def build(flags: str) -> None:
        config = load_config([*words, *flags.split()])
        pipeline = load_pipeline(config.model, torch.device("cpu"))
        attach_adapters(config, pipeline, family_of(pipeline))
        check_trajectory(config, build_chain(config, pipeline))

    build("")
    with pytest.raises(ConfigError) as caught:  # 3 PiB, which no machine has
        build("--resolution 16384 --train_batch_size 4096 --num_inference_steps 1000")
    assert str(caught.value).startswith("train_batch_size: expected samples that fit the ")
    assert "got 4096 of 1000 steps with latents of 4 x 4096 x 4096, which take 3.07e+06 GiB; lower" in str(caught.value)
    monkeypatch.setattr(chain_building, "total_memory", lambda device: 2**30)  # a small machine
    with pytest.raises(ConfigError) as caught:
        build("--rank 65536")
    assert str(caught.value).startswith(
        "rank: expected an adapter that fits the 1 GiB of cpu memory, got 65536, which "
    )


def test_the_sentence_comes_first_and_a_traceback_only_into_foreign_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    raise KeyError('mine')\n")
    images = torch.zeros(1, 3, 8, 8)
    for spec in ("no_such_module:f", f"{tmp_path / 'mine.py'}:g"):
        with pytest.raises(SystemExit), reporting_errors():
            load_reward(spec)
        printed = capsys.readouterr().err
        assert printed.startswith("error: reward ") and printed.count("\n") == 1
    with pytest.raises(SystemExit), reporting_errors():
        load_reward(f"{tmp_path / 'mine.py'}:f")(images, ["a"], [{}])
    first, second, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("error: reward ") and second.startswith("Traceback") and last == "KeyError: 'mine'"
    with pytest.raises(SystemExit), reporting_errors():
        load_reward("tiny-shapes")(torch.zeros(1, 3, 64, 64), ["no shape at all"], [{}])
    assert capsys.readouterr().err.count("\n") == 1


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
