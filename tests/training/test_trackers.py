"""The real trackers, offline: they get config, curves and images, and never a token."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from PIL import Image

from rlr_peft.errors import UserError
from tests.training.runs import build, config_file, run_script

TOKEN = "a-token-of-no-known-form"
NAMES = ("wandb", "trackio", "swanlab", "tensorboard")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.setenv(name, "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # elsewhere than in the home folder


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", NAMES)
def test_config_curves_and_images_arrive_and_no_token(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    values = {"estimator": "full-bp", "num_inference_steps": 2, "max_train_steps": 1, "validation_steps": 1}
    values |= {"validation_prompt": ["a cat"], "num_validation_images": 1, "skip_final_inference": False}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run_script(
        monkeypatch,
        config_file(workplace, tmp_path / "out", **values),
        *(
            "--report_to",
            name,
            "--hub_token",
            TOKEN,
            "--reward_model_path",
            f"{{a: 'https://me:{TOKEN}@example.com/'}}",
        ),
    )
    if name == "wandb":  # another process writes its file, and ends with this one
        import_module("wandb").teardown()
    folder = tmp_path / "trackio" if name == "trackio" else tmp_path / "out" / "logs"
    files = [path for path in folder.rglob("*") if path.is_file()]
    contents = b"".join(path.read_bytes() for path in files)
    assert b"first_order_steps" in contents, "curves"
    assert b"max_grad_norm" in contents or (folder / "rlr-lora" / "hparams.yml").is_file(), "config"
    assert TOKEN.encode() not in contents
    if name != "tensorboard":  # which keeps images inside its events
        stored = [numpy.asarray(Image.open(path).convert("RGB")) for path in files if path.suffix == ".png"]
        for step in range(2):
            drawn = numpy.asarray(Image.open(tmp_path / "out" / "validation" / f"step-{step:06d}" / "000.png"))
            assert any(numpy.array_equal(drawn, one) for one in stored), f"image of update {step}"


def test_a_tracker_that_does_not_start_ends_the_run_before_it_costs_time(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "logs" / "rlr-lora").touch()  # where TensorBoard's folder goes
    flags = ["--report_to", "tensorboard", "--evaluation_prompt_path", str(workplace / "unseen.txt")]
    with pytest.raises(SystemExit) as left:
        run_script(monkeypatch, config_file(workplace, tmp_path / "out"), *flags)
    printed = capsys.readouterr().err
    assert left.value.code == 1
    assert "error: report_to: expected tensorboard to start, got FileExistsError" in printed
    assert "Evaluating the base" not in printed and not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_tracker_that_is_missing_is_named(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--report_to trackio: expected the package trackio.*rlr-peft\[trackio\]"):
        build(config_file(workplace, tmp_path / "out", report_to="trackio"))
