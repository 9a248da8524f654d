"""The report, and the command that writes it."""

import json
import re
from pathlib import Path

from diffusers import DDIMScheduler
from PIL import Image

from rlr_peft.diagnose import Diagnosis, console_text, recommend, write_report
from tests.pipelines import tiny_stable_diffusion
from tests.programs import completed


def assert_self_contained(html: str) -> None:
    assert "http" not in re.sub(r'xmlns[:\w]*="[^"]*"', "", html) and "@import" not in html and "src=" not in html
    assert re.findall(r'<link [^>]*href="([^"]*)"', html) == ["data:,"] and html.count("<svg") == 1
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\{#", html)


def test_the_report_is_one_page_with_numbers_and_figure_beside_it(chaotic: Diagnosis, tmp_path: Path) -> None:
    advice = recommend(chaotic)
    page, numbers, picture = write_report(tmp_path / "new" / "report.html", chaotic, advice)
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json", "report.png"]
    html = page.read_text(encoding="utf-8")
    assert_self_contained(html)
    assert "linear &lt;chain&gt;" in html and "linear <chain>" not in html
    assert "<code>--ho_length 1</code>" in html and "`" not in html
    data = json.loads(numbers.read_text())
    assert [row["name"] for row in data["methods"]] == [r.method.name for r in chaotic.results]
    assert data["profile"]["steps"] == [1, 2, 3, 4, 5, 6] and len(data["profile"]["energy"]) == 6
    with Image.open(picture) as figure:
        assert figure.format == "PNG" and figure.width == 1000
    row = data["methods"][0]
    assert {"cosine", "length", "variance", "noise_scale", "improvement_per_cost"} <= set(row)
    text = console_text(chaotic, advice)
    for shown in (text, html):
        assert shown.index("Take ") < shown.index("gain/cost") < shown.index("What a sample costs")
    assert advice.flags in text and max(len(line) for line in text.splitlines()) <= 120


def test_the_command_end_to_end(tmp_path: Path) -> None:
    pipeline = tiny_stable_diffusion("v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)  # sigma_1 = 0
    pipeline.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("red ball\nblue box\ngreen tree\n")
    (tmp_path / "rewards.py").write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    config = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "prompt_path": tmp_path / "prompts.txt",
        "reward_fn": f"{tmp_path / 'rewards.py'}:redness",
        "num_inference_steps": 3,
        "train_batch_size": 2,
        "num_images_per_prompt": 2,
    }
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in config.items()))
    words = ["--config", str(path), "--samples", "3", "--output", str(tmp_path / "out" / "report.html"), "--rank", "2"]
    done = completed(["-m", "rlr_peft", "diagnose", *words, "--samples", "5"])
    assert done.returncode == 0, done.stderr
    assert "Recommendation" in done.stdout and "full-bp" in done.stdout
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (data["num_samples"], data["num_steps"], data["config"]["rank"]) == (6, 3, 2)
    assert data["facts"]["base"] == "base" and "LoRA of rank 2" in data["facts"]["trained"]
    names = {row["name"] for row in data["methods"]}
    assert {"full-bp", "reinforce", "ddpo", "grpo", "d3po", "refl", "rlr-paper", "rlr, mixed orders"} <= names
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert_self_contained(html)
    assert str(tmp_path) not in html
    with Image.open(tmp_path / "out" / "report.png") as figure:
        assert figure.format == "PNG"
