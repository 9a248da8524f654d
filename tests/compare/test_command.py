"""`rlr-peft compare` as users run it: real processes, kill -9, a private repository, adapters that do not fit."""

import csv
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from rlr_peft.cli import main
from rlr_peft.inference import DiffusiveChainOfThought
from rlr_peft.lora import WEIGHT_NAME
from tests.compare.adapter_hub import adapter_hub
from tests.families.image_pipelines import sd3
from tests.pipelines import tiny_stable_diffusion
from tests.programs import LIBRARIES, Program
from tests.test_lora_fitting import adapter_of

TOKEN = "hf_secret"
REWARDS = """
import os
import time
from pathlib import Path

def redness(images, prompts):
    time.sleep(float(os.environ.get("SLOW", "0")))
    with (Path(__file__).parent / "calls.txt").open("a") as file:
        file.write(f"{len(prompts)}\\n")
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)), {"blue": images[:, 2].mean((1, 2))}

def edges(images, prompts):
    return (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, prompts, rewards and two adapters; `run` is a training run's folder with its config."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny_stable_diffusion("v_prediction", timestep_spacing="trailing").save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("a cat\na dog\na sea\n")
    (folder / "rewards.py").write_text(REWARDS)
    adapter_of(tiny_stable_diffusion(), folder / "run")
    adapter_of(tiny_stable_diffusion(), folder / "second", rank=2, seed=3)
    config = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "prompt_path": str(folder / "prompts.txt"),
        "reward_fn": f"{folder}/rewards.py:redness",
        "heldout_reward_fn": [f"{folder}/rewards.py:edges"],
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "evaluation_batch_size": 2,
        "num_evaluation_images": 8,
        "rank": 4,
    }
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def words(workplace: Path, output: Path, *adapters: str) -> list[str]:
    named = [word for place in (str(workplace / "run"), *adapters) for word in ("--adapter", place)]
    config = str(workplace / "run" / "config.yaml")
    own = ["--output", str(output), "--images_per_prompt", "2", "--kl_images", "3"]
    return ["compare", *named, "--config", config, *own]


def start(*command: str, **environment: str) -> Program:
    return Program(["-m", "rlr_peft", *command], os.environ | environment, LIBRARIES, stderr=subprocess.STDOUT)


def scores_of(output: Path) -> list[dict[str, str]]:
    with (output / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_killed_and_started_again_it_goes_on(workplace: Path, tmp_path: Path) -> None:
    """kill -9 while the second adapter, of a private repository, is drawn; then the same as without interruption."""
    output, hub_home = tmp_path / "killed", tmp_path / "hub"
    with adapter_hub("someone/second", workplace / "second", TOKEN) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(hub_home), "HF_TOKEN": TOKEN}
        command = words(workplace, output, "someone/second")
        (workplace / "calls.txt").unlink(missing_ok=True)
        killed = start(*command, **environment, SLOW="0.2")
        deadline = time.monotonic() + 240
        while not list(output.glob("images/second-*/*.png")):
            assert killed.poll() is None, killed.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert not (output / "compare.html").exists()
        drawn = {path: path.stat().st_mtime_ns for path in output.glob("images/*/*.png")}
        assert 16 < len(drawn) < 24
        process = start(*command, **environment)
        printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert TOKEN not in "".join(path.read_text() for path in output.glob("compare.*"))
    # What was whole is as it was: base and first adapter, and of the second every batch that was finished.
    kept = [path for path, changed in drawn.items() if path.stat().st_mtime_ns == changed]
    assert len(kept) >= 16 + 2 * ((len(drawn) - 16) // 2) - 2
    calls = len((workplace / "calls.txt").read_text().splitlines())
    assert 12 <= calls <= 13, "3 models x 4 batches, and the one that the kill hit"
    numbers = json.loads((output / "compare.json").read_text())
    assert numbers["facts"]["adapters"] == "run, someone/second"

    whole = tmp_path / "whole"
    assert main(words(workplace, whole, str(workplace / "second"))) == 0
    assert scores_of(whole) == scores_of(output)
    assert (whole / "scores.parquet").read_bytes() == (output / "scores.parquet").read_bytes()
    expected = json.loads((whole / "compare.json").read_text())
    assert numbers["base"] == expected["base"]
    for ours, theirs in zip(numbers["adapters"], expected["adapters"], strict=True):
        # Sums of thousands of squares may round otherwise in another process.
        assert ours.pop("kl") == pytest.approx(theirs.pop("kl"), rel=1e-4)
        assert ours == theirs
    first, second = json.loads((output / "compare.json").read_text())["adapters"]
    assert first["kl"]["value"] > 0 and second["kl"]["value"] > 0 and first["kl_samples"] == 3
    assert first["attributes"]["rewards.py:redness"].keys() == {"blue"}


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of one adapter; tests work on copies."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert main(words(workplace, output)) == 0
    return output


def test_what_is_finished_is_found_again(
    workplace: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for an image that was damaged meanwhile, which is drawn again."""
    output = shutil.copytree(finished, tmp_path / "out")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    (workplace / "calls.txt").write_text("")
    victim = next(output.glob("images/run-*/*.png"))
    os.truncate(victim, victim.stat().st_size // 2)
    assert main(words(workplace, output)) == 0
    assert (workplace / "calls.txt").read_text() == ""
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    printed = capsys.readouterr().out
    assert "Settings of" not in printed and "Drawing training's own prompts" in printed
    assert "rewards.py:edges (held out)" in printed and "compare.html" in printed


@pytest.mark.parametrize(
    ("flags", "redrawn"),
    [(["--guidance_scale", "2"], 2), (["--eta", "0.5"], 0)],
    ids=["guidance", "eta of the KL"],
)
def test_what_a_setting_changes_is_drawn_again(
    workplace: Path, finished: Path, tmp_path: Path, flags: list[str], redrawn: int
) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    before = set(output.glob("images/*/*.png"))
    assert main([*words(workplace, output), *flags]) == 0
    fresh = set(output.glob("images/*/*.png")) - before
    assert len(fresh) == 8 * redrawn
    files = [output / row["image"] for row in scores_of(output)]
    assert len(set(files)) == 16 and all(file.is_file() for file in files)


def test_scores_are_those_of_the_kept_images(finished: Path) -> None:
    for row in scores_of(finished):
        pixels = numpy.asarray(Image.open(finished / row["image"])).astype(numpy.float64) / 255
        redness = (pixels[..., 0] - pixels[..., 1:].mean(-1)).mean()
        assert float(row["rewards.py:redness"]) == pytest.approx(redness, abs=1e-6)
        assert float(row["rewards.py:redness/blue"]) == pytest.approx(pixels[..., 2].mean(), abs=1e-6)


def test_stage_prompts_draw_what_the_chain_of_thought_draws(
    workplace: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--dcot_columns` and `--dcot` condition every stage on its own prompt, `--dcot false` none."""
    stages = {"coarse": "a sea", "mid": "a dog", "fine": "a cat"}
    (tmp_path / "stages.jsonl").write_text(json.dumps({"text": "a cat", **stages}) + "\n")
    settings = ["--prompts", str(tmp_path / "stages.jsonl"), "--dcot_columns", "coarse", "mid", "fine"]
    command = [*words(workplace, tmp_path / "out"), *settings, "--num_images", "2", "--kl_images", "0"]
    assert main(command) == 0
    first = [row for row in scores_of(tmp_path / "out") if row["model"] == "base"]
    assert "stages" in json.loads((tmp_path / "out" / "compare.json").read_text())["facts"]
    pipeline = StableDiffusionPipeline.from_pretrained(workplace / "base", safety_checker=None)
    thought = DiffusiveChainOfThought(pipeline, num_inference_steps=3, guidance_scale=3.0, eta=0.0)
    drawn = thought([stages] * 2, seeds=[int(row["seed"]) for row in first])
    for image, row in zip(drawn.images, first, strict=True):
        assert numpy.array_equal(numpy.asarray(image), numpy.asarray(Image.open(tmp_path / "out" / row["image"])))
    assert main([*command, "--dcot", "false"]) == 0
    plain = [row for row in scores_of(tmp_path / "out") if row["model"] == "base"]
    assert [row["seed"] for row in plain] == [row["seed"] for row in first]
    assert [row["rewards.py:redness"] for row in plain] != [row["rewards.py:redness"] for row in first]
    assert "stages" not in json.loads((tmp_path / "out" / "compare.json").read_text())["facts"]
    assert main([*words(workplace, tmp_path / "rules"), "--num_images", "2", "--kl_images", "0", "--dcot"]) == 0
    assert "built-in rules" in json.loads((tmp_path / "rules" / "compare.json").read_text())["facts"]["stages"]


def test_an_adapter_of_another_base_stops_before_anything_is_drawn(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_of(sd3(), tmp_path / "foreign")
    with pytest.raises(SystemExit) as left:
        main(words(workplace, tmp_path / "out", str(tmp_path / "foreign")))
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith(
        f"error: The adapter {tmp_path / 'foreign'} does not fit the base, a StableDiffusionPipeline: "
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_effect_is_told(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lora_B = 0: it fits, and does nothing."""
    tensors = load_file(workplace / "run" / WEIGHT_NAME)
    still = {name: torch.zeros_like(value) if ".lora_B." in name else value for name, value in tensors.items()}
    (tmp_path / "still").mkdir()
    save_file(still, tmp_path / "still" / WEIGHT_NAME)
    config = str(workplace / "run" / "config.yaml")
    flags = ["--adapter", str(tmp_path / "still"), "--config", config, "--output", str(tmp_path / "out")]
    assert main(["compare", *flags, "--num_images", "2"]) == 0
    assert "still draws exactly the base's images: it has no effect" in capsys.readouterr().out
    (adapter,) = json.loads((tmp_path / "out" / "compare.json").read_text())["adapters"]
    assert adapter["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert adapter["kl_samples"] == 2, "no more than there are images"
    assert adapter["rewards"]["rewards.py:redness"]["win_rate"] == 0.5


EVIL = """
from pathlib import Path
Path(__file__).with_name("imported").touch()

def reward(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def downloaded(workplace: Path, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder of somebody else's with an adapter and a hostile config; and what connects to the addresses in it."""
    folder = shutil.copytree(workplace / "run", tmp_path / "downloaded")
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "secret.txt").write_text("my secret\n")
    (folder / "prompts.txt").write_text("a cat\n")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(str(self.headers))

        def do_GET(self) -> None:
            self.do_POST()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    config = {
        "pretrained_model_name_or_path": str(workplace / "base"),
        "prompt_path": str(folder / "prompts.txt"),
        "evaluation_prompt_path": str(folder / "link.txt"),
        "reward_fn": {f"{tmp_path}/evil.py:reward": 1.0, "jpeg-compressibility": 2.0},
        "heldout_reward_fn": [url, "os:system", "jpeg-incompressibility"],
        "reward_model_path": {"openai/clip-vit-large-patch14": str(tmp_path)},
        "dcot_endpoint": f"{url}/v1",
        "dcot_endpoint_model": "some-model",
        "dcot_cache": str(tmp_path / "appended.jsonl"),
        "cache_dir": str(tmp_path / "cache"),
        "attention_backend": "_flash_3_hub",
        "output_dir": str(tmp_path / "elsewhere"),
        "resume_from_checkpoint": str(tmp_path),
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "num_evaluation_images": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    yield folder, asked
    server.shutdown()
    server.server_close()


def test_a_config_that_came_with_an_adapter_runs_connects_and_writes_nothing(
    downloaded: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain values and registered rewards are taken, and one line says what is not."""
    folder, asked = downloaded
    monkeypatch.setenv("OPENAI_API_KEY", "my-key")
    before = {path for path in tmp_path.rglob("*")}
    flags = ["--adapter", str(folder), "--output", str(tmp_path / "out"), "--kl_images", "0"]
    assert main(["compare", *flags]) == 0
    assert not asked
    made = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")} - before
    assert not made, "neither evil.py's mark nor the folders and files of the config"
    first, *_ = capsys.readouterr().out.splitlines()
    config = folder / "config.yaml"
    assert first == (
        f"Settings of {config}, where no flag says otherwise. Left out, as a config that is found may name code, "
        "addresses and files: attention_backend, cache_dir, dcot_cache, dcot_endpoint, dcot_endpoint_model, "
        "evaluation_prompt_path, heldout_reward_fn, reward_fn, reward_model_path; if you trust "
        f"it, give --config {config}."
    )
    rows = scores_of(tmp_path / "out")
    assert {row["prompt"] for row in rows} == {"a cat"} and len(rows) == 4
    assert {"jpeg-compressibility", "jpeg-incompressibility"} <= rows[0].keys() and "my secret" not in str(rows)


def test_what_is_left_out_and_needed_is_asked_for(
    downloaded: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = downloaded
    config = folder / "config.yaml"
    config.write_text(f"pretrained_model_name_or_path: tiny-shapes\nreward_fn: {tmp_path}/evil.py:reward\n")
    with pytest.raises(SystemExit) as left:
        main(["compare", "--adapter", str(folder), "--prompts", "tiny-shapes/test", "--output", str(tmp_path / "out")])
    assert left.value.code == 2 and not (tmp_path / "imported").exists()
    expected = f"error: reward: expected a value, got none; give it, or --config {config}, if you trust it.\n"
    assert capsys.readouterr().err == expected


def test_ctrl_c_is_answered_with_what_to_do(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlr_peft.compare.run.load_pipeline", interrupted)
    with pytest.raises(SystemExit) as left:
        main(words(workplace, tmp_path / "out"))
    assert left.value.code == 130
    assert capsys.readouterr().err.endswith("What is drawn is kept, and the same command goes on from there.\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: missing adapter; give it as a flag (--adapter VALUE); adapter also as a word of its own.\n"),
        (["--adapter", "a/b"], "error: base: expected a value, got none; give it, or --config with "),
        (["--adapter", "a/b", "--base", "tiny-shapes"], "error: prompts: expected a value, got none"),
        (["--adapter", "a/b", "--images_per_prompt", "0"], "error: images_per_prompt: expected at least 1 and at most"),
        (["--adapter", "a/b", "--rank", "8"], "error: command line: --rank matters to training only; leave it out.\n"),
        (["--adapter", "a/b", "--num_images", "x"], "error: num_images: expected a whole number or null, got x"),
        (["--adapter", "a/b", "--gidance_scale", "3"], "error: command line: unknown name gidance_scale; did you mean"),
        (
            ["--adapter", "a/b", "--base", "x", "--reward", "y", "--prompts", "no.txt"],
            "error: evaluation_prompt_path: expected an existing text file, .jsonl, .csv or .parquet, or one of ",
        ),
        (["--adapter", "a/b", "--output", __file__], "error: output: expected a place to write to, got"),
        (
            ["--adapter", "a/b", "--base", "x", "--pretrained_model_name_or_path", "y"],
            "error: base: expected it or pretrained_model_name_or_path, which means the same, got both; drop one.\n",
        ),
    ],
)
def test_a_wrong_command_line_is_refused_at_once(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["compare", *flags])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and printed.err.count("\n") == 1


def test_help_shows_its_own_flags_and_those_that_matter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["compare", "--help-all"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert (
        text.index("--adapter TEXT [TEXT ...]") < text.index("--images_per_prompt N") < text.index("--guidance_scale ")
    )
    assert "--learning_rate" not in text and "--estimator" not in text
