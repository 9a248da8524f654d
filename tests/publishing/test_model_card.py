"""The card: its metadata parse, its snippet runs, and it says nothing that the run does not know."""

import ast
import html
import json
import os
import re
import subprocess
import sys
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from rlr_peft.cli.main import main
from rlr_peft.foreign_text import fenced
from rlr_peft.intervals import with_error
from rlr_peft.lora import WEIGHT_NAME, attach_lora, save_lora
from rlr_peft.lora.export import KOHYA_NAME
from rlr_peft.publishing.card import TemplateError, addressed_card, write_card, write_model_card
from rlr_peft.publishing.licenses import License, base_license
from rlr_peft.publishing.record import ImagePair, RunRecord, StoredCard, load_stored_card
from rlr_peft.publishing.snippet import base_kind
from rlr_peft.publishing.uploads import is_ours
from rlr_peft.redaction import redacted, redacted_command
from rlr_peft.tiny_shapes import pipeline_path
from tests.pipelines import tiny_stable_diffusion

METRICS = {
    "reward_before": 0.6123,
    "reward_before_se": 0.0123,
    "reward_after": 0.91,
    "reward_after_se": 0.0061,
    "reward_gain": 0.2977,
    "reward_gain_se": 0.0131,
    "reward_win_rate": 0.8125,
    "heldout_before": 0.6,
    "heldout_before_se": 0.01,
    "heldout_after": 0.8,
    "heldout_after_se": 0.01,
    "heldout_gain": 0.2,
    "heldout_gain_se": 0.012,
    "heldout_win_rate": 0.75,
    "n": 256,
    "seconds": 222.0,
    "peak_memory_mb": 1912.3,
    "denoiser_evaluations": 34000,
}
MINIMAL = RunRecord(base_model="CompVis/stable-diffusion-v1-4", reward_name="jpeg-compressibility", config={"rank": 4})
FULL = RunRecord(
    base_model="tiny-shapes",
    reward_name="tiny-shapes",
    heldout_name="tiny-shapes-heldout",
    config={"rank": 4, "estimator": "rlr", "lora_alpha": None, "validation_prompt": ["a ``` b", "c: d"]},
    metrics=METRICS,
    evaluation_prompts="unseen prompts",
    evaluation="20 steps, eta 0.",
    estimator=["Steps 1 to 6 are first order.", "The others are half order."],
    coverage="Every step has weight 1.",
    license="apache-2.0",
    tags=["stable-diffusion", "lora"],
    inference={"num_inference_steps": 2, "guidance_scale": 4.0},
    prompts=[f'prompt "{index}" with \\ and \'' for index in range(12)],
    prompt_count=12_000,
    before_after="before_after.png",
    reward_curve="reward_curve.png",
    images=[("images/one.png", "a small red star"), ("images/two.png", "a ring: blue")],
    pairs=[ImagePair("a | b", "images/base_0.png", "images/adapter_0.png", 0.4, 0.75)],
    settings={"update": "16 samples", "optimiser": "AdamW"},
    selection=["Training ended as planned."],
    command="accelerate launch train_rlr_lora.py --config configs/tiny_shapes.yaml",
    hardware="2 CPU cores",
    versions={"torch": "2.13.0", "diffusers": "0.42.1"},
    commit="abc123",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder with the images that `FULL` names."""
    path = tmp_path / "my-adapter"
    for name in (
        "before_after.png",
        "reward_curve.png",
        *(f"images/{name}.png" for name in ("one", "two", "base_0", "adapter_0")),
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path / name)
    return path


def outside_code(text: str) -> str:
    """The card without its code blocks."""
    return re.sub(r"^(`{3,}).*?^\1$", "CODE", text, flags=re.MULTILINE | re.DOTALL)


def rows_of(text: str) -> list[str]:
    """The table of rewards, with plain spaces."""
    rows = [row.replace("\N{NO-BREAK SPACE}", " ") for row in text.splitlines() if row.startswith("| ")]
    start = next((index for index, row in enumerate(rows) if row.startswith("| reward |")), len(rows))
    return [row for index, row in enumerate(rows[start:]) if index == 0 or row.startswith("| `")]


def check_sections(text: str) -> None:
    body = outside_code(text)
    assert "TODO" not in body
    assert "None" not in body
    assert "{" not in body
    assert "\n\n\n" not in text
    # What follows a heading is no other heading, and not the end.
    for match in re.finditer(r"^#+ .*\n+(.*)", body, flags=re.MULTILINE):
        assert match.group(1).strip(), match.group(0)
        assert not match.group(1).startswith("#"), match.group(0)


def test_metadata_of_a_full_record(folder: Path) -> None:
    data = ModelCard.load(write_model_card(folder, record=FULL)).data
    assert data.library_name == "diffusers"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-to-image"
    assert data.tags.count("lora") == 1
    assert {"rlr", "reward-fine-tuning", "template:sd-lora", "stable-diffusion", "text-to-image"} <= set(data.tags)
    assert data.widget[1] == {"text": "a ring: blue", "output": {"url": "images/two.png"}}
    assert data.base_model is None  # the embedded pipeline is no repository on the Hub
    assert data.model_name == "my-adapter"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "tiny-shapes": 0.91,
        "tiny-shapes-heldout": 0.8,
    }


def test_metadata_of_a_base_on_the_hub(folder: Path) -> None:
    record = replace(MINIMAL, license="other", license_name="sd", license_link="https://example.org/licence")
    data = ModelCard.load(write_model_card(folder, record=record)).data.to_dict()
    assert data["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert data["base_model_relation"] == "adapter"
    assert (data["license"], data["license_name"]) == ("other", "sd")
    assert "widget" not in data
    assert "model-index" not in data
    assert "rlr" not in data["tags"]  # the configuration does not say that RLR was used


def test_a_full_card_tells_what_was_measured(folder: Path) -> None:
    text = write_model_card(folder, record=FULL).read_text()
    check_sections(text)
    assert rows_of(text) == [
        "| reward | base | adapter | gain [95 % interval] | won | images |",
        "| `tiny-shapes` (trained on) | 0.612 ± 0.012 | 0.9100 ± 0.0061 | +0.298 [+0.272, +0.323] | 81% | 256 |",
        "| `tiny-shapes-heldout` (held out) | 0.600 ± 0.010 | 0.800 ± 0.010 | +0.200 [+0.176, +0.224] | 75% | 256 |",
    ]
    assert "On unseen prompts its reward rose (+0.298 ± 0.013)." in text
    assert "| training time | 3 min 42 s |" in text
    assert "| peak memory | 1,912 MB |" in text
    assert "| denoiser evaluations | 34,000 |" in text
    assert "Steps 1 to 6 are first order. The others are half order. Every step has weight 1." in text
    assert "https://arxiv.org/abs/2502.00639" in text
    assert "The first 10 of its 12,000 training prompts:" in text
    assert "20 steps, eta 0.\nTraining ended as planned." in text
    assert "| a \\| b | ![base](images/base_0.png)<br>0.400 | ![adapter](images/adapter_0.png)<br>0.750 |" in text
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / path).is_file()


def test_the_configuration_can_be_read_back(folder: Path) -> None:
    text = write_model_card(folder, record=FULL).read_text()
    block = re.search(r"^(`{3,})yaml\n(.*?)\n\1$", text, flags=re.MULTILINE | re.DOTALL)
    assert block
    assert yaml.safe_load(block.group(2)) == dict(FULL.config)


def test_a_minimal_card_has_no_empty_section(tmp_path: Path) -> None:
    text = write_model_card(tmp_path / "new", record=MINIMAL).read_text()
    check_sections(text)
    for absent in ("<Gallery", "## Results", "![", "held-out reward `", "The command", "training prompts:", "| | |"):
        assert absent not in text


@pytest.mark.parametrize("field", ["metrics", "estimator", "coverage", "prompts", "command", "hardware", "evaluation"])
def test_any_single_unknown_leaves_no_hole(folder: Path, field: str) -> None:
    check_sections(write_model_card(folder, record=replace(FULL, **{field: getattr(MINIMAL, field)})).read_text())
    check_sections(write_model_card(folder, record=replace(MINIMAL, **{field: getattr(FULL, field)})).read_text())


def test_images_that_are_not_there_are_left_out(folder: Path, tmp_path: Path) -> None:
    text = write_model_card(tmp_path / "elsewhere", record=FULL).read_text()
    check_sections(text)
    assert ".png)" not in text
    assert "widget" not in text
    figure_only = replace(FULL, images=(), before_after_prompts=["a small red star"])
    data = ModelCard.load(write_model_card(folder, record=figure_only)).data
    assert data.widget == [{"text": "a small red star", "output": {"url": "before_after.png"}}]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"heldout_gain": 0.01}, "never trained on, did not change measurably"),
        ({"heldout_gain": -0.2}, "The two disagree: this adapter probably exploits a flaw"),
        ({"reward_gain": -0.2}, "its reward fell"),
        ({"reward_gain": 0.0, "reward_gain_se": 0.0}, "its reward did not change measurably"),
    ],
)
def test_the_verdict_follows_the_numbers(folder: Path, changes: dict[str, float], expected: str) -> None:
    text = write_model_card(folder, record=replace(FULL, metrics={**METRICS, **changes})).read_text()
    assert expected in text
    assert ("The two disagree" in text) == ("disagree" in expected)


def test_a_reward_with_missing_numbers_gets_no_row(folder: Path) -> None:
    partial = {key: value for key, value in METRICS.items() if key != "heldout_gain_se"}
    text = write_model_card(folder, record=replace(FULL, metrics=partial)).read_text()
    check_sections(text)
    assert "(held out)" not in text
    assert "`tiny-shapes-heldout` was measured while training, on training prompts (the curve above), but not" in text
    text = write_model_card(folder, record=replace(FULL, metrics=partial, heldout_name=None)).read_text()
    assert "No held-out reward was measured" in text


def six(before: float, gain: float, prefix: str, error: float = 0.01) -> dict[str, float]:
    values = {"before": before, "after": before + gain, "gain": gain}
    return {f"{prefix}_{key}{end}": v for key, value in values.items() for end, v in (("", value), ("_se", error))}


def test_every_reward_of_several_has_a_row_of_its_own(folder: Path) -> None:
    metrics = {
        **six(1.0, 0.5, "reward"),
        **six(0.5, 0.2, "reward/color"),
        **six(0.6, 0.1, "reward/texture/soft"),
        **six(30.0, -4.0, "reward/texture/soft/kB"),
        **six(0.7, 0.1, "heldout"),
        **six(0.7, 0.1, "heldout/judge"),
        **six(0.8, -0.3, "heldout/judge/shape"),
        "n": 64,
    }
    record = replace(
        FULL,
        reward_name="1 color + 0.5 texture/soft",
        reward_weights={"color": 1.0, "texture/soft": 0.5},
        heldout_name="judge",
        heldout_names=["judge", "judge/shape"],
        metrics=metrics,
    )
    text = write_model_card(folder, record=record).read_text()
    check_sections(text)
    assert [row.split(" | ")[0] for row in rows_of(text)[1:]] == [
        "| `1 color + 0.5 texture/soft` (trained on, weighted sum of scaled rewards)",
        "| `color` (trained on, weight 1)",
        "| `texture/soft` (trained on, weight 0.5)",
        "| `judge` (held out)",
        "| `judge/shape` (held out)",
    ]
    assert "texture/soft/kB" not in text, "no reward, but what one tells beside its score"
    assert "# LoRA of tiny-shapes for the rewards color and texture/soft\n" in text
    assert "the weighted sum of its rewards rose" in text
    assert "trained on the rewards `color` and `texture/soft` with rlr-peft" in text
    assert "`judge` and `judge/shape` were measured too, never trained on" in text
    # The first held-out reward rose; another fell, and that is said.
    assert "exploits a flaw of its reward** (`judge/shape` fell)" in text
    data = ModelCard.load(folder / "README.md").data
    assert len(data.eval_results) == 5


def test_the_comparison_page_and_scores_are_named_where_they_are(folder: Path) -> None:
    for name, expected in (("scores.parquet", "[scores.parquet](scores.parquet) holds"), ("compare.html", ") shows")):
        assert name not in write_model_card(folder, record=FULL).read_text()
        (folder / name).write_bytes(b"")
        text = write_model_card(folder, record=FULL).read_text()
        check_sections(text)
        assert expected in text
        assert "](compare.html) shows" not in text or "browser. [scores.parquet]" in text
    check_sections(write_model_card(folder, record=MINIMAL).read_text())


NASTY = (
    'a \\| b <b>bold</b> </script> <!-- `tick` ``` *star* _u_ [l](http://x) ![i](y) $x$ ~~s~~ "q" &lt; <lora:x:1>'
    "\r\n\n---\n# head\u2028next \u202b\u05d0\u05d1\u202c \N{GRINNING FACE} \x1b[31m {{ 7 }} {% if %}"
)
# In one line: what would turn letters around, or move a cursor, is written out.
NASTY_SHOWN = NASTY
for mark, written in {"\u202b": "\\u202b", "\u202c": "\\u202c", "\u2028": "\\u2028", "\x1b": "\\x1b"}.items():
    NASTY_SHOWN = NASTY_SHOWN.replace(mark, written)
NASTY_LINE = " ".join(NASTY_SHOWN.split())


def test_prompts_are_shown_as_they_are_and_break_nothing(folder: Path) -> None:
    record = replace(
        FULL,
        pairs=[ImagePair(NASTY, "images/base_0.png", "images/adapter_0.png", 0.4, 0.75)],
        images=[("images/one.png", NASTY)],
        prompts=[NASTY, "second " * 100],
        stages={"layout": 0.25, "detail": 0.75},
        stage_prompts=[NASTY, "fine " * 200],
        reward_name="a|b`c",
    )
    text = write_model_card(folder, record=record).read_text()
    assert ModelCard.load(folder / "README.md").data.widget[0]["text"] == NASTY_SHOWN.replace("\r\n", "\n")
    lines = text.splitlines()
    for start, columns in (("| a &#92;\\|", 3), ("| layout |", 3), ("| detail |", 3), ("| ``", 6)):
        (row,) = [line for line in lines if line.startswith(start)]
        assert len(re.split(r"(?<!\\)\|", row)) == columns + 2, row
    (cell,) = [line.split(" | ")[2] for line in lines if line.startswith("| layout |")]
    assert html.unescape(cell.removesuffix(" |").replace("\\|", "|")) == NASTY_LINE
    assert not re.search(r"[<>`*_\[\]$~]", cell), "no markup is left"
    (long,) = [line for line in lines if line.startswith("| detail |")]
    assert len(long) < 340 and long.endswith("\N{HORIZONTAL ELLIPSIS} |")
    (block,) = re.findall(r"^(`{3,})text\n(.*?)\n\1$", text, flags=re.MULTILINE | re.DOTALL)
    assert block[1].splitlines()[0] == NASTY_LINE and len(block[1].splitlines()) == 2
    (_, snippet), *_ = re.findall(r"^(`{3,})python\n(.*?)\n\1$", text, flags=re.MULTILINE | re.DOTALL)
    texts = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert NASTY in texts, "written out in the snippet, it is the same prompt"
    assert not [mark for mark in text if unicodedata.category(mark) in ("Cc", "Cf", "Zl", "Zp") and mark != "\n"]


def test_stages_of_a_chain_of_thought(folder: Path) -> None:
    record = replace(FULL, stages={"layout": 0.25, "detail": 0.75}, stage_prompts=["a red | blob", "a red star"])
    text = write_model_card(folder, record=record).read_text()
    check_sections(text)
    assert "| layout | 25% | a red \\| blob |" in text and "diffusive-chain-of-thought" in text


def test_secrets_are_crossed_out(folder: Path) -> None:
    command = "python train_rlr_lora.py --reward_fn http://me:password@host/ --x hf_abcdefghijklmnopqrstuvwxyz"
    text = write_model_card(folder, record=replace(FULL, command=command)).read_text()
    assert "http://***@host/" in text and "hf_abc" not in text and "password" not in text
    for secret, shown in (
        ("https://ghp_0123456789@github.com/x", "https://***@github.com/x"),
        ("http://host/score?Api_Key=abc&size=3", "http://host/score?Api_Key=***&size=3"),
        ("http://host/?size=3&access_token=abc", "http://host/?size=3&access_token=***"),
        ("me@host.org https://host.org/@me?monkey", "me@host.org https://host.org/@me?***"),  # a token may stand alone
    ):
        assert redacted(secret) == shown
    words = ["train.py", "--hub_token", "secret", "--rank", "4", "--hub_token=secret"]
    assert redacted_command(words) == ["train.py", "--rank", "4"]


def test_extra_text_and_a_template_that_cannot_be_rendered(folder: Path) -> None:
    text = write_model_card(folder, record=FULL, extra_text="## Mine\n\nHand-written.\n").read_text()
    check_sections(text)
    assert "\n\n## Mine\n\nHand-written.\n\n## Use it\n" in text
    for template, message in (
        ("{{ card_data }} {% if %}", "cannot be rendered"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("---\ntags: [\n---\n", "cannot be rendered"),
        ("{{ card_data }} {{ titel }}", "names what is not there: titel. Did you mean title"),
        ("{{ card_data }} {{ qqqq }}", "names what is not there: qqqq. Its variables are base_text, before_after"),
    ):
        with pytest.raises(TemplateError, match=message):
            write_model_card(folder, record=FULL, template=template)


@pytest.mark.parametrize(
    "reach",
    [
        "{{ title.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch HERE/reached') }}",
        "{{ lipsum.__globals__['os'].popen('touch HERE/reached').read() }}",
        "{% include 'README.md' %}",
        "{{ pairs.clear() }}",
    ],
)
def test_a_template_that_came_with_a_run_reaches_no_python(
    folder: Path, reach: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(folder, StoredCard(FULL))
    stored = json.loads((folder / "run_record.json").read_text())
    stored["template"] = "---\n{{ card_data }}\n---\n" + reach.replace("HERE", str(tmp_path))
    (folder / "run_record.json").write_text(json.dumps(stored))
    before = (folder / "README.md").read_bytes()
    assert main(["card", str(folder)]) == 1
    assert capsys.readouterr().err.startswith("error: The template of the card cannot be rendered (")
    assert (folder / "README.md").read_bytes() == before and not (tmp_path / "reached").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32)\nimport evil  #"}, "expected a name of Python, got 'float32)"),
        ({"inference": {"x=1)\nimport evil\n(y": 1}}, "expected a name of Python, got 'x=1)"),
        ({"denoisers": ["unet\nimport evil"]}, "expected a name of Python, got 'unet"),
        ({"before_after": "../../secret.png"}, "expected the name of a file in its folder, got '../../secret.png'"),
        ({"images": [["/etc/hostname", "a cat"]]}, "expected the name of a file in its folder, got '/etc/hostname'"),
        ({"metrics": {"reward_gain": "[x](y)"}}, "expected a number, got"),
        ({"fps": "8)\nimport evil"}, "expected a number, got"),
    ],
)
def test_a_record_that_came_with_an_adapter_puts_no_code_into_the_card(
    folder: Path, changes: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(folder, StoredCard(FULL))
    stored = json.loads((folder / "run_record.json").read_text())
    stored["record"] |= changes
    (folder / "run_record.json").write_text(json.dumps(stored))
    assert main(["card", str(folder)]) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_a_base_that_is_no_repository_is_no_link(folder: Path) -> None:
    text = write_model_card(folder, record=replace(MINIMAL, base_model="x](javascript:a) <b>")).read_text()
    assert "for `x](javascript:a) <b>`, trained" in outside_code(text)


def test_a_card_is_written_again_from_its_records(folder: Path) -> None:
    first = write_card(folder, StoredCard(FULL)).read_bytes()
    plain = [json.loads(json.dumps(asdict(record))) for record in (load_stored_card(folder).record, FULL)]
    assert plain[0] == plain[1]
    (folder / "README.md").unlink()
    (folder / "extra.md").write_text("Hand-written.")
    (folder / "mine.md").write_text("---\n{{ card_data }}\n---\n\n# {{ title }}\n\n{{ extra_text }}\n")
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_bytes() == first
    title = "# LoRA of tiny-shapes for the reward tiny-shapes"
    words = ["--template", str(folder / "mine.md"), "--extra_text", str(folder / "extra.md")]
    assert main(["card", str(folder), *words]) == 0
    assert (folder / "README.md").read_text().endswith(f"{title}\n\nHand-written.\n")
    # Both are remembered, also when the card is addressed to a repository; and can be forgotten.
    addressed = addressed_card(folder, "owner/name")
    assert addressed is not None and write_card(folder, addressed).read_text().endswith("Hand-written.\n")
    assert main(["card", str(folder), "--plain"]) == 0
    assert 'load_lora_weights("owner/name"' in (folder / "README.md").read_text()


def test_a_card_that_was_edited_is_kept_beside_the_new_one(folder: Path) -> None:
    path = write_card(folder, StoredCard(FULL))
    assert main(["card", str(folder)]) == 0 and not (folder / "README.edited.md").exists()
    path.write_text("# by hand\n")
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.edited.md").read_text() == "# by hand\n"
    assert path.read_text().startswith("---\n")


@pytest.mark.parametrize("damage", [None, "{", '{"record": {"base_model": "x", "unknown": 1}}'])
def test_a_folder_without_records_is_refused(
    tmp_path: Path, damage: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage is not None:
        (tmp_path / "run_record.json").write_text(damage)
    assert main(["card", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: mit", License("mit")),
        ("license: other\nlicense_name: sd\nlicense_link: LICENSE.md", License("other", "sd", "LICENSE.md")),
        ("tags: [x]", License()),
        ("license: [", License()),
        (None, License()),
    ],
)
def test_the_licence_is_that_of_the_bases_card(tmp_path: Path, metadata: str | None, expected: License) -> None:
    if metadata is not None:
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\nA base.\n")
    assert base_license(str(tmp_path)) == expected


def test_licences_of_bases_whose_card_cannot_be_read() -> None:
    """HF_HUB_OFFLINE is set in tests."""
    assert base_license("tiny-shapes") == License("apache-2.0")
    assert base_license("stabilityai/stable-diffusion-xl-base-1.0") == License("openrail++")
    link = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert base_license("black-forest-labs/FLUX.1-dev") == License("other", "flux-1-dev-non-commercial-license", link)
    assert base_license("someone/their-finetune") == License()


def test_writing_twice_gives_the_same_bytes(folder: Path) -> None:
    first = write_model_card(folder, record=FULL).read_bytes()
    (folder / "README.md").write_text("something old that must not survive\n" * 100)
    assert write_model_card(folder, record=FULL).read_bytes() == first


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("---\n{{ card_data }}\n---\n\n# {{ title }}\n")
    template = (tmp_path / "mine.md").read_text()
    text = write_model_card(tmp_path, record=MINIMAL, template=template).read_text()
    assert text.endswith("# LoRA of stable-diffusion-v1-4 for the reward jpeg-compressibility\n")


def run_snippet(folder: Path) -> None:
    """Run the card's code as a reader would, in the adapter's folder and without a network."""
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)\n```$", text, flags=re.MULTILINE | re.DOTALL)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def save_adapter(pipeline: object, folder: Path) -> None:
    """An adapter that visibly changes the images."""
    parameters = attach_lora(pipeline.unet, target_modules=["to_q", "to_k", "to_v", "to_out.0"], rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_lora(pipeline, folder)


def test_the_snippet_draws_the_image_of_the_adapter_on_a_local_pipeline(tmp_path: Path) -> None:
    base, adapter = tmp_path / 'a "base" folder', tmp_path / "adapter"
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(base)
    prompt, inference = 'say "hi" {{ 7 }} \\ é', {"num_inference_steps": 2, "negative_prompt": 'a "bad" \\ one'}

    def draw() -> Image.Image:
        return pipeline(prompt, **inference, generator=torch.Generator().manual_seed(0)).images[0]

    without_adapter = draw()
    save_adapter(pipeline, adapter)
    write_model_card(
        adapter, record=replace(MINIMAL, base_model=str(base), inference=inference, prompts=[prompt, "another"])
    )
    run_snippet(adapter)
    with Image.open(adapter / "image.png") as picture:
        drawn = picture.convert("RGB").tobytes()
    assert drawn == draw().tobytes()
    assert drawn != without_adapter.tobytes()


def test_the_snippet_runs_on_tiny_shapes(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    save_adapter(StableDiffusionPipeline.from_pretrained(pipeline_path()), folder)
    write_model_card(folder, record=FULL)
    run_snippet(folder)
    with Image.open(folder / "image.png") as picture:
        assert picture.size == (64, 64)


def test_a_published_adapter_is_loaded_from_the_hub(folder: Path) -> None:
    text = write_model_card(folder, record=replace(FULL, repo_id="someone/their-adapter")).read_text()
    expected = 'pipe.load_lora_weights("someone/their-adapter", weight_name="pytorch_lora_weights.safetensors")'
    assert expected in text
    assert "In the folder of this file" not in text


def test_the_snippet_names_branches_and_parts_that_are_not_the_bases(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    record = replace(
        MINIMAL,
        repo_id="me/x",
        hub_revision="trial",
        base_options={"revision": "fp16", "variant": "fp16"},
        components={"vae": str(tmp_path / "vae"), "motion_adapter": "someone/motion"},
        fps=8,
        denoisers=["unet"],
    )
    text = write_model_card(folder, record=record).read_text()
    for line in (
        "from diffusers import AnimateDiffPipeline, AutoModel, MotionAdapter",
        f'vae = AutoModel.from_pretrained("{tmp_path / "vae"}", dtype=torch.float32)',
        'motion_adapter = MotionAdapter.from_pretrained("someone/motion", dtype=torch.float32)',
        'pipe = AnimateDiffPipeline.from_pretrained("CompVis/stable-diffusion-v1-4", revision="fp16", variant="fp16", '
        "vae=vae, motion_adapter=motion_adapter, dtype=torch.float32)",
        'pipe.load_lora_weights("me/x", weight_name="pytorch_lora_weights.safetensors", revision="trial")',
    ):
        assert f"\n{line}\n" in text, line
    through_peft = write_model_card(folder, record=replace(record, peft_config={"r": 2})).read_text()
    assert 'hf_hub_download("me/x", "pytorch_lora_weights.safetensors", revision="trial")' in through_peft


def test_a_snippet_with_another_vae_runs(tmp_path: Path) -> None:
    base, adapter, vae = tmp_path / "base", tmp_path / "adapter", tmp_path / "vae"
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(base)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 0.3
    pipeline.vae.save_pretrained(vae)
    save_adapter(pipeline, adapter)
    inference = {"num_inference_steps": 2}
    record = replace(
        MINIMAL, base_model=str(base), components={"vae": str(vae)}, inference=inference, prompts=["a cat"]
    )
    write_model_card(adapter, record=record)
    run_snippet(adapter)
    drawn = pipeline("a cat", **inference, generator=torch.Generator().manual_seed(0)).images[0]
    with Image.open(adapter / "image.png") as picture:
        assert picture.convert("RGB").tobytes() == drawn.tobytes()


def test_where_a_base_comes_from(tmp_path: Path) -> None:
    assert base_kind("tiny-shapes") == "embedded"
    assert base_kind(str(tmp_path)) == "folder"
    assert base_kind("CompVis/stable-diffusion-v1-4") == "hub"


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (0.61234, 0.0123, "0.612 ± 0.012"),
        (0.91, 0.0061, "0.9100 ± 0.0061"),
        (-12.345, 1.26, "-12.3 ± 1.3"),
        (1234.5, 56.7, "1,234 ± 57"),
        (0.5, 0.0, "0.5"),
    ],
)
def test_numbers_are_shown_to_two_digits_of_their_error(mean: float, error: float, expected: str) -> None:
    assert with_error(mean, error) == expected


def test_a_fence_is_longer_than_those_inside() -> None:
    assert fenced("a ```` b", "text") == "`````text\na ```` b\n`````"


def test_what_a_run_makes_is_known_and_what_is_the_users_is_left() -> None:
    for name in (WEIGHT_NAME, f"transformer_2/{WEIGHT_NAME}", KOHYA_NAME, "README.md", "images/base_0.png"):
        assert is_ours(name), name
    for name in ("images/mine.png", "images/drafts/base_0.png", "kohya/other.safetensors", "LICENSE"):
        assert not is_ours(name), name
