"""The notebook of the docs: its cells run in a folder of their own, and what it shows is what they give."""

import json
import os
from pathlib import Path

from tests.programs import ROOT, Program

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_the_notebook_trains_and_shows_the_hacked_reward(tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed, errors = (process := Program(["-c", code], environment, cwd=tmp_path)).communicate(timeout=600)
    assert process.returncode == 0, errors
    measured = json.loads((tmp_path / "outputs" / "blue" / "metrics.json").read_text())
    assert measured["reward_gain"] > 0.2 and measured["heldout_gain"] < -0.1
    assert f"gain {measured['reward_gain']:+.3f}" in printed

    outputs = json.dumps([cell["outputs"] for cell in cells])
    assert outputs.count("image/png") == 2 and "gain +0.4" in outputs
    assert not any(place in outputs for place in ("/work", "/home", "/root", "/tmp", "site-packages"))
