"""The card: its metadata parse, and it says nothing that the run does not know."""

import ast
import html
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from rlr_peft.files import KOHYA_NAME, WEIGHT_NAME
from rlr_peft.foreign_text import fenced
from rlr_peft.publishing import ImagePair, License, Rewards, RunRecord, is_ours
from rlr_peft.redaction import redacted, redacted_command
from rlr_peft.reports import with_error
from tests.publishing.records import CONFIG, FULL, METRICS, MINIMAL, changed, write

KNOWN = [("machine", name) for name in ("command", "hardware", "versions", "commit")]
KNOWN += [("training", name) for name in ("terms", "first_order", "coverage")]


def card_data(folder: Path, record: RunRecord) -> ModelCardData:
    write(folder, record)
    return ModelCard.load(folder / "README.md").data


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
    data = card_data(folder, FULL)
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
    licence = License("other", "sd", "https://example.org/licence")
    data = card_data(folder, changed(MINIMAL, base={"license": licence})).to_dict()
    assert data["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert data["base_model_relation"] == "adapter"
    assert (data["license"], data["license_name"]) == ("other", "sd")
    assert "widget" not in data
    assert "model-index" not in data
    assert "rlr" not in data["tags"]  # the configuration does not say that RLR was used


def test_a_full_card_tells_what_was_measured(folder: Path) -> None:
    text = write(folder, FULL)
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
    told = (
        "Gradient estimator `rlr` (first order) over a chain of 10 ancestral steps with eta 1 and guidance scale 4. "
        "Every update used 16 samples, 4 for each prompt. K was between 3 and 6.5 of 10 in its updates. "
        "Every step has weight 1."
    )
    assert f"\n\n{told}\n\n" in text
    measured = changed(FULL, config=FULL.config | {"num_images_per_prompt": "auto"}, training={"images_per_prompt": 2})
    assert "Every update used 16 samples, 2 for each prompt." in write(folder, measured)
    assert "| adapter | LoRA of rank 4, alpha 4, 25,088 weights in the unet |" in text
    assert "| update | 16 samples (4 prompts x 4) on 2 processes |" in text
    assert "| optimiser | AdamW, learning rate 0.002 (constant), gradients clipped to norm 1 |" in text
    assert "| packages | torch 2.13.0, diffusers 0.42.1 |\n| commit of rlr-peft | `abc123` |" in text
    assert "https://arxiv.org/abs/2502.00639" in text
    assert "The first 10 of its 12,000 training prompts:" in text
    assert "\n\nDrawn with 20 steps, eta 0.\nThe run took all its updates. The numbers" in text
    assert "![base and adapter side by side](before_after.png)" in text and "![base](images/base_0.png)" not in text
    assert "accelerate launch train_rlr_lora.py \\\n    --config configs/tiny_shapes.yaml\n```" in text
    row = "| a \\| b | ![base](images/base_0.png)<br>0.400 | ![adapter](images/adapter_0.png)<br>0.750 |"
    assert row in write(folder, changed(FULL, images={"before_after": None}))
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / path).is_file()


def test_the_configuration_can_be_read_back(folder: Path) -> None:
    text = write(folder, FULL)
    block = re.search(r"^(`{3,})yaml\n(.*?)\n\1$", text, flags=re.MULTILINE | re.DOTALL)
    assert block
    assert yaml.safe_load(block.group(2)) == dict(FULL.config)


def test_a_minimal_card_has_no_empty_section(tmp_path: Path) -> None:
    text = write(tmp_path / "new", MINIMAL)
    check_sections(text)
    for absent in ("<Gallery", "## Results", "![", "held-out reward `", "The command", "training prompts:", "| | |"):
        assert absent not in text


@pytest.mark.parametrize("group", ["metrics", "prompts", "images", "training", "machine", "sampling", "rewards"])
def test_any_single_unknown_leaves_no_hole(folder: Path, group: str) -> None:
    check_sections(write(folder, replace(FULL, **{group: getattr(MINIMAL, group)})))
    check_sections(write(folder, replace(MINIMAL, config=CONFIG, **{group: getattr(FULL, group)})))


@pytest.mark.parametrize(("group", "name"), KNOWN)
def test_any_single_fact_may_be_unknown(folder: Path, group: str, name: str) -> None:
    check_sections(write(folder, changed(FULL, **{group: {name: None}})))


def test_images_that_are_not_there_are_left_out(folder: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "elsewhere", FULL)
    check_sections(text)
    assert ".png)" not in text
    assert "widget" not in text
    figure_only = changed(FULL, images={"gallery": (), "before_after_prompts": ["a small red star"]})
    data = card_data(folder, figure_only)
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
    text = write(folder, changed(FULL, metrics={**METRICS, **changes}))
    assert expected in text
    assert ("The two disagree" in text) == ("disagree" in expected)


def test_a_reward_with_missing_numbers_gets_no_row(folder: Path) -> None:
    partial = {key: value for key, value in METRICS.items() if key != "heldout_gain_se"}
    text = write(folder, changed(FULL, metrics=partial))
    check_sections(text)
    assert "(held out)" not in text
    assert "`tiny-shapes-heldout` was measured while training, on training prompts (the curve above), but base" in text
    text = write(folder, changed(FULL, metrics=partial, rewards={"heldout": ()}))
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
        rewards=Rewards(
            "1 color + 0.5 texture/soft", {"color": 1.0, "texture/soft": 0.5}, heldout=["judge", "judge/shape"]
        ),
        metrics=metrics,
    )
    text = write(folder, record)
    check_sections(text)
    assert [row.split(" | ")[0] for row in rows_of(text)[1:]] == [
        "| `1 color + 0.5 texture/soft` (trained on, weighted sum of scaled rewards)",
        "| `color` (trained on, weight 1)",
        "| `texture/soft` (trained on, weight 0.5)",
        "| `judge` (held out)",
        "| `judge/shape` (held out)",
    ]
    assert "texture/soft/kB" not in text, "no reward, but what one tells beside its score"
    assert "# color and texture/soft LoRA for tiny-shapes\n" in text
    assert "the weighted sum of its rewards rose" in text
    assert "trained on the rewards `color` and `texture/soft` with rlr-peft" in text
    assert "`judge` and `judge/shape` were measured too, never trained on" in text
    # The first held-out reward rose; another fell, and that is said.
    assert "exploits a flaw of its reward** (`judge/shape` fell)" in text
    data = ModelCard.load(folder / "README.md").data
    assert len(data.eval_results) == 5


def test_the_comparison_page_and_scores_are_named_where_they_are(folder: Path) -> None:
    for name, expected in (("scores.parquet", "[scores.parquet](scores.parquet) holds"), ("compare.html", ") shows")):
        assert name not in write(folder, FULL)
        (folder / name).write_bytes(b"")
        text = write(folder, FULL)
        check_sections(text)
        assert expected in text
        assert "](compare.html) shows" not in text or "browser. [scores.parquet]" in text
    check_sections(write(folder, MINIMAL))


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
    record = changed(
        FULL,
        images={
            "pairs": [ImagePair(NASTY, "images/base_0.png", "images/adapter_0.png", 0.4, 0.75)],
            "gallery": [("images/one.png", NASTY)],
            "before_after": None,
        },
        prompts={
            "shown": [NASTY, "second " * 100],
            "stages": {"layout": 0.25, "detail": 0.75},
            "stage_prompts": [NASTY, "fine " * 200],
        },
        rewards={"name": "a|b`c"},
    )
    text = write(folder, record)
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
    stages = {"stages": {"layout": 0.25, "detail": 0.75}, "stage_prompts": ["a red | blob", "a red star"]}
    record = changed(FULL, prompts=stages)
    text = write(folder, record)
    check_sections(text)
    assert "| layout | 25% | a red \\| blob |" in text and "diffusive-chain-of-thought" in text


@pytest.mark.parametrize(
    ("config", "stopped", "expected"),
    [
        ({}, None, "The run took all its updates. The numbers were measured once, at the end."),
        (
            {"early_stopping_steps": 20},
            None,
            "Early stopping watched the held-out reward on training prompts and did not end the run. The numbers were "
            "measured once, at the end.",
        ),
        (
            {"early_stopping_steps": 20},
            "It fell.",
            "Early stopping on the held-out reward, measured on training prompts, ended the run and chose these "
            "weights. The numbers were measured once, afterwards.",
        ),
        (
            {"early_stopping_steps": 20, "kl_limit": 3.0},
            "It left.",
            "Early stopping on the held-out reward and the divergence from the base, measured on training prompts",
        ),
    ],
)
def test_what_chose_the_weights(folder: Path, config: dict[str, float], stopped: str | None, expected: str) -> None:
    record = changed(FULL, config=CONFIG | config, training={"stopped_early": stopped})
    text = write(folder, record)
    check_sections(text)
    assert f"eta 0.\n{expected}" in text
    assert "\nIt is not recorded whether the settings were tuned on such numbers before.\n" in text
    assert (f"10 in its updates. {stopped} Every step" in text) == (stopped is not None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"config": CONFIG | {"use_dora": True, "lora_alpha": 8, "use_rslora": True}},
            "DoRA of rank 4, alpha 8 (rsLoRA)",
        ),
        ({"config": CONFIG | {"use_8bit_adam": True}}, "| optimiser | AdamW in 8 bits, learning rate 0.002"),
        ({"config": CONFIG | {"mixed_precision": "bf16"}}, "| base weights | bf16 |"),
        ({"config": CONFIG | {"kl_beta": 0.01}}, "| penalty | 0.01 per nat of divergence from the base |"),
        ({"metrics": METRICS | {"kl": 0.79, "kl_se": 0.14, "kl_n": 2}}, "0.79 ± 0.14 nats (KL of 2 sampled paths) |"),
        ({"training": {"first_order": [10, 10]}}, "K was 10 of 10 in its updates, that is full backpropagation."),
        ({"training": {"reward_decoder": "tae"}}, "on images of the small decoder `tae`, so its gradient is biased"),
        (
            {"base": {"dtype": "bfloat16"}},
            "```\n\nThis code draws in bfloat16. The numbers were measured with float32 latents",
        ),
        ({"config": CONFIG | {"bnb_quantization_config_path": "b.json"}}, "a base that bitsandbytes held in few bits"),
        ({"sampling": {"difference": "Other noise."}}, "```\n\nOther noise.\n\nThe adapter has"),
        ({"prompts": {"count": 10}}, "Its training prompts:"),
        ({"prompts": {"count": None}}, "The first of its training prompts:"),
    ],
)
def test_facts_in_words(folder: Path, changes: dict[str, dict[str, object]], expected: str) -> None:
    text = write(folder, changed(FULL, **changes))
    check_sections(text)
    assert expected in text


def test_secrets_are_crossed_out(folder: Path) -> None:
    command = "python train_rlr_lora.py --reward_fn http://me:password@host/ --x hf_abcdefghijklmnopqrstuvwxyz"
    text = write(folder, changed(FULL, machine={"command": command}))
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


def test_a_base_that_is_no_repository_is_no_link(folder: Path) -> None:
    text = write(folder, changed(MINIMAL, base={"model": "x](javascript:a) <b>"}))
    assert "for `x](javascript:a) <b>`, trained" in outside_code(text)


def test_writing_twice_gives_the_same_bytes(folder: Path) -> None:
    first = write(folder, FULL)
    (folder / "README.md").write_text("something old that must not survive\n" * 100)
    assert write(folder, FULL) == first


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("---\n{{ card_data }}\n---\n\n# {{ title }}\n")
    template = (tmp_path / "mine.md").read_text()
    text = write(tmp_path, MINIMAL, template=template)
    assert text.endswith("# jpeg-compressibility LoRA for stable-diffusion-v1-4\n")


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
