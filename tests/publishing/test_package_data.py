"""The card's template is one file, and an installed wheel trains, compares and writes cards without a checkout."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rlr_peft.publishing import default_template_path

REPOSITORY = Path(__file__).parents[2]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('.')"
SHORT = (
    "--max_train_steps 1 --train_batch_size 2 --num_inference_steps 3 --num_evaluation_images 2 --calibration_samples 2"
)


def test_the_packages_template_is_the_file_at_the_top() -> None:
    assert default_template_path().resolve() == (REPOSITORY / "model_card_template.md").resolve()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, because setuptools writes into the folder that it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("rlr_peft", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "model_card_template.md"):
        shutil.copy(REPOSITORY / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (built,) = source.glob("*.whl")
    return built


def of_a_plain_install(wheel: Path) -> set[Path]:
    """Folders and files of all that the wheel asks for without an extra, directly or not."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        asked = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    to_do, found = [(line, "") for line in asked], set()
    while to_do:
        line, extra = to_do.pop()
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
            for name in {(wanted.name, more) for more in ("", *wanted.extras)} - found:
                found.add(name)
                to_do += [(line, name[1]) for line in distribution(name[0]).requires or ()]
    installed = Path(sysconfig.get_path("purelib"))
    tops = {file.parts[0] for name, _ in found for file in distribution(name).files or ()}
    return {installed / top for top in tops - {"..", "__pycache__"}}


def test_a_wheel_holds_what_is_read_at_run_time(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("rlr_peft/publishing/model_card_template.md").decode()
        names = archive.namelist()
    assert content == (REPOSITORY / "model_card_template.md").read_text()
    shipped = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "configs").rglob("*") if path.is_file()]
    assert {"rlr_peft/diagnose/report.html.j2", *(f"rlr_peft/{path}" for path in shipped)} <= set(names)


def test_an_installed_wheel_trains_compares_and_writes_cards(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows what the wheel asks for without extras, outside a checkout."""
    venv.create(tmp_path / "venv", with_pip=False)
    python, script = (tmp_path / "venv" / "bin" / name for name in ("python", "rlr-peft"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = ["--python", str(python), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, env=environment)
    (packages,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    for path in of_a_plain_install(wheel):
        (packages / path.name).symlink_to(path)

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run(python, "-c", "import rlr_peft; print(rlr_peft.__file__)")
    assert where.startswith(str(packages))
    printed = run(script, "train", "--config", "tiny_shapes", *SHORT.split(), "--output_dir", "run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "rlr-peft train \\\n    --config tiny_shapes \\\n" in card and str(tmp_path) not in card
    assert "compare.html" in printed
    assert (tmp_path / "run" / "compare.html").is_file()
    (tmp_path / "run" / "README.md").unlink()
    run(python, "-m", "rlr_peft", "card", "run")
    assert (tmp_path / "run" / "README.md").read_text() == card
    assert "usage:" in run(python, "-m", "rlr_peft.train", "--help")
    assert not (packages / "bitsandbytes").exists() and not (packages / "datasets").exists()
