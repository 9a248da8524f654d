"""The console script, as a process: what it prints, where, and its exit codes."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlr_peft import __version__
from rlr_peft.cli import main
from rlr_peft.config import MOST_USED, knobs
from tests.programs import ROOT, completed

REQUIRED = "--pretrained_model_name_or_path tiny-shapes --prompt_path tiny-shapes/train --reward_fn tiny-shapes".split()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlr_peft", *words], capture_output=True, text=True, timeout=60, check=False
    )


def run_with_imports_made(*words: str) -> subprocess.CompletedProcess[str]:
    """For commands that come to import torch."""
    return completed(["-m", "rlr_peft", *words])


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"rlr-peft {__version__}\n")


def test_installed_script_is_the_same_program() -> None:
    script = Path(sys.executable).parent / "rlr-peft"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"rlr-peft {__version__}\n")


def test_config_prints_yaml_that_it_accepts_again(tmp_path: Path) -> None:
    first = run("config", *REQUIRED, "--rank", "7")
    assert first.returncode == 0
    assert first.stderr == ""
    assert yaml.safe_load(first.stdout)["rank"] == 7
    path = tmp_path / "config.yaml"
    path.write_text(first.stdout, encoding="utf-8")
    again = run("config", "--config", str(path))
    assert (again.returncode, again.stdout) == (0, first.stdout)


def test_recipes_are_known_by_name_wherever_one_is() -> None:
    listed = run("config", "--list")
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = listed.stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert any(line.split(maxsplit=1) == ["sdxl", "Stable Diffusion XL at 1024x1024."] for line in lines)
    assert all(line.endswith(".") for line in lines), "one whole sentence each"
    by_name = run("config", "--config", "sdxl")
    assert by_name.returncode == 0 and by_name.stdout == run("config", "--config", "configs/sdxl.yaml").stdout
    unknown = run("config", "--config", "sdx")
    assert unknown.returncode == 2
    assert unknown.stderr == (
        "error: --config sdx: expected a YAML file or a recipe (`rlr-peft config --list`), got neither, seen from "
        f"{Path.cwd()}; correct it. Did you mean sdxl?\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config", *REQUIRED, "--rnk", "7"], "error: command line: unknown name rnk; did you mean rank?\n"),
        (["config", *REQUIRED, "--rank", "x"], "error: rank: expected a whole number, got x; write --rank VALUE.\n"),
        (["config"], "error: missing pretrained_model_name_or_path, reward_fn; "),
        (["config", *REQUIRED, "--eta", "0"], "error: estimator: expected noise in the chain"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_wrong_command_is_exit_code_2_and_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["trane"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: command: expected train, config, plan, ") and error.count("\n") == 1


def test_flags_before_the_command_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--config", "sdxl"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    assert error.endswith("got --config; write a command before it: rlr-peft train --config ...\n")


def test_no_command_is_answered_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert "\n  plan " in printed.err and printed.out == ""


@pytest.mark.parametrize("word", ["--help", "-h", "help", "--help-all"])
def test_help_lists_the_commands(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([word])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in ("card", "compare", "merge", "push", "space"))
    assert "Check a configuration" in printed and "Measure every gradient estimator" in printed


def test_help_is_short_and_names_what_one_needs() -> None:
    done = run("train", "--help")
    assert done.returncode == 0 and done.stderr == ""
    shown = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
    assert shown[2:] == ["dry_run", *MOST_USED] and len(done.stdout.splitlines()) < 80
    assert {name for name, knob in knobs().items() if knob.required} <= set(shown)
    (example,) = re.findall(r"example:\n  rlr-peft train (.*)", done.stdout, re.DOTALL)
    assert run("config", *example.replace("\\\n", " ").split()).returncode == 0


def test_help_all_is_grouped_complete_and_quick() -> None:
    started = time.perf_counter()
    done = run("train", "--help-all")
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    text = " ".join(done.stdout.split()).replace("- ", "-")
    position = 0
    for name, knob in knobs().items():
        title = " ".join(knob.group_title.split())
        sentence = knob.field.metadata["sentence"].replace("- ", "-")
        assert text.index(f"{title}:") < text.index(f" --{name} "), name
        assert text.index(f" --{name} ", position) > position, f"{name} is out of order"
        position = text.index(f" --{name} ", position)
        assert sentence in text[position : position + 500], name
    shown = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
    assert shown[1:] == ["dry_run", *knobs()], "each once, and none by another tool's name"
    assert seconds < 5, "--help must not load torch (it takes about 0.2 s on a quiet machine)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["serve-reward", "--reward", "jpeg-compressibility", "--port", "99999"],
            "error: port: expected at least 0 and at most 65535, got 99999",
        ),
        (
            ["serve-reward", "--reward", "jpeg-compressibility", "--device", "foo"],
            "error: device: expected a device that is here",
        ),
        (["plan", *REQUIRED, "--output", "FILE/plan.json"], "error: output: expected a place to write to, got "),
        (["diagnose", *REQUIRED, "--output", "FILE/a.html"], "error: output: expected a place to write to, got "),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_with_imports_made(*(word.replace("FILE", str(tmp_path / "file")) for word in words))
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_an_address_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_with_imports_made("serve-reward", "--reward", "jpeg-compressibility", "--port", port)
    assert done.returncode == 2
    assert f"got 127.0.0.1:{port}" in done.stderr and done.stderr.count("\n") == 1


def test_a_damaged_config_beside_the_adapter_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rank: [")
    done = run_with_imports_made("push", str(tmp_path))
    assert done.returncode == 1
    assert "config.yaml is damaged" in done.stderr and done.stderr.count("\n") == 1


def test_diagnose_help_shows_its_own_flags_and_those_of_training() -> None:
    done = run("diagnose", "--help")
    assert done.returncode == 0
    assert done.stdout.index("--samples N") < done.stdout.index("--output TEXT") < done.stdout.index("--rank ")
    assert "--lora_dropout" not in done.stdout and "--lora_dropout" in run("diagnose", "--help-all").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "many"], "error: samples: expected a whole number, got many; write --samples VALUE.\n"),
        (["--samples", "3"], "error: samples: expected at least 4 and at most 1000000, got 3; change --samples.\n"),
        (
            ["--output", "report.pdf"],
            "error: output: expected a file that ends in .html, got report.pdf; rename it.\n",
        ),
        (["--sample", "8"], "error: command line: unknown name sample; did you mean "),
        (["--rank", "0"], "error: rank: expected at least 1 and at most 65536, got 0; change --rank.\n"),
    ],
)
def test_a_wrong_flag_of_diagnose_is_refused_at_once(words: list[str], message: str) -> None:
    done = run("diagnose", *REQUIRED, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
