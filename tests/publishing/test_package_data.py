"""The card's template is one file, and a built package holds all templates."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from rlr_peft.publishing.card import default_template_path

REPOSITORY = Path(__file__).parents[2]


def test_the_packages_template_is_the_file_at_the_top() -> None:
    assert default_template_path().resolve() == (REPOSITORY / "model_card_template.md").resolve()


def test_a_wheel_holds_the_templates(tmp_path: Path) -> None:
    source = tmp_path / "source"
    # Without the heavy weights, and in a copy because setuptools writes into the folder that it builds.
    heavy = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(REPOSITORY / "rlr_peft", source / "rlr_peft", symlinks=True, ignore=heavy)
    for name in ("pyproject.toml", "README.md", "LICENSE", "model_card_template.md"):
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, source / name)
    subprocess.run(
        [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("rlr_peft/publishing/model_card_template.md").decode()
        names = archive.namelist()
    assert content == (REPOSITORY / "model_card_template.md").read_text()
    assert "rlr_peft/diagnose/report.html.j2" in names
