"""Names and values that cannot be read, and what a person is told."""

import re
from pathlib import Path

import pytest

from rlr_peft.cli import main
from rlr_peft.config import ELSEWHERE, ConfigError, knobs
from rlr_peft.config import load_config as load
from tests.config.loading import REQUIRED, refusal, write


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--rnk", "rank"), ("--learnin-rate", "learning_rate"), ("--lr_schedular=cosine", "lr_scheduler")],
)
def test_unknown_flag_suggests_the_nearest(flag: str, nearest: str) -> None:
    assert f"did you mean {nearest}?" in refusal(flag, "1")


@pytest.mark.parametrize("theirs", ELSEWHERE)
def test_names_of_other_trainers_lead_to_ours(theirs: str, tmp_path: Path) -> None:
    assert theirs not in knobs() and ELSEWHERE[theirs] in knobs()
    expected = f"unknown name {theirs}; here it is {ELSEWHERE[theirs]}."
    assert refusal(f"--{theirs}", "1") == f"command line: {expected}"
    assert refusal("--config", write(tmp_path, f"{theirs}: 1\n")).endswith(expected)


def test_the_docs_have_the_names_of_other_trainers() -> None:
    text = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`--.+`) \| `--(\w+)` \|$", text, re.MULTILINE)
    assert {theirs: ours for names, ours in rows for theirs in re.findall(r"`--(\w+)`", names)} == ELSEWHERE


def test_kinds_of_adapters_that_are_not_trained_are_told(tmp_path: Path) -> None:
    expected = "unknown name use_lokr; LoRA and DoRA (--use_dora) are trained here, as load_lora_weights of most "
    assert refusal("--use-lokr").startswith(f"command line: {expected}")
    assert expected in refusal("--config", write(tmp_path, "use_lokr: true\n"))


def test_dashes_are_underscores() -> None:
    config = load([*REQUIRED, "--learning-rate", "0.5", "--train-batch-size=8", "--negative-prompt=a-b"])
    assert (config.optimizer.learning_rate, config.chain.negative_prompt) == (0.5, "a-b")


def test_unknown_yaml_name_suggests_the_nearest_and_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "rank: 3\nnum_inference_step: 4\n")
    message = refusal("--config", path)
    assert message == f"--config {path}: unknown name num_inference_step; did you mean num_inference_steps?"


def test_unknown_name_like_nothing_points_to_help() -> None:
    assert "see --help-all" in refusal("--zzzzzzzz")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rank four", "rank: expected a whole number, got four; write --rank VALUE."),
        ("--lr_scheduler cosin", "write --lr_scheduler VALUE. Did you mean cosine?"),
        ("--rank 4.5", "rank: expected a whole number, got 4.5; write --rank VALUE."),
        ("--rank null", "rank: expected a whole number, got null; write --rank VALUE."),
        ("--learning_rate fast", "learning_rate: expected a number or auto, got fast; write --learning_rate VALUE."),
        ("--mixed_precision fp8", "mixed_precision: expected no or fp16 or bf16, got fp8"),
        ("--use_dora maybe", "use_dora: expected true or false, got maybe"),
        ("--fo_steps most", "fo_steps: expected a whole number or auto or random or null, got most"),
        ("--lr_scheduler sawtooth", "lr_scheduler: expected linear or cosine or"),
        ("--optimizer adam", "optimizer: expected AdamW or Adafactor or Lion or Muon or Prodigy, got adam"),
        ("--seed", "seed: expected a whole number, got nothing"),
        ("--dcot_fractions 1 b", "dcot_fractions: expected numbers or null, got b"),
        ("--validation_prompt", "validation_prompt: expected one or more texts or null, got nothing"),
        ("stray", "got the stray stray"),
        ("--config", "--config: expected the path of a YAML file, got nothing"),
        ("--config a.yaml --config b.yaml", "--config: expected one file, got a.yaml and b.yaml"),
    ],
)
def test_wrong_flag_value_is_one_clear_line(argv: str, message: str) -> None:
    got = refusal(*argv.split())
    assert message in got
    assert "\n" not in got


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: four", "rank: expected a whole number, got 'four'"),
        ("rank: true", "rank: expected a whole number, got true"),
        ("rank: 4.0", "rank: expected a whole number, got 4.0"),
        ("rank:", "rank: expected a whole number, got null"),
        ("revision: 12", "revision: expected a text or null, got 12; put quotes around it"),
        ("use_dora: 1", "use_dora: expected true or false, got 1"),
        ("dcot_fractions: [1, x]", "dcot_fractions: expected numbers or null, got [1, 'x']"),
        ("rank: 3\nrank: 4", "rank is given twice"),
        ("rank: [3", "not valid YAML"),
        ("- rank", "expected lines of `name: value`, got a list"),
        ("lora:\n  rank: 3", "unknown name lora"),
        ("3: 4", "unknown name 3"),
    ],
)
def test_wrong_yaml_value_is_one_clear_line_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    got = refusal("--config", path)
    assert got.startswith(f"--config {path}: ")
    assert message in got
    assert "\n" not in got


def test_wrong_yaml_value_is_refused_though_a_flag_overrides_it(tmp_path: Path) -> None:
    assert "rank: expected a whole number" in refusal("--rank", "3", "--config", write(tmp_path, "rank: x"))


@pytest.mark.parametrize("name", ["heldout_reward_fn", "validation_prompt", "dcot_columns"])
def test_an_empty_list_is_refused(tmp_path: Path, name: str) -> None:
    """An empty heldout_reward_fn would leave early stopping with nothing to watch."""
    got = refusal(*REQUIRED, "--config", write(tmp_path, f"{name}: []"))
    assert got == f"{name}: expected one or more values, got an empty list; fill it or leave it out."


def test_a_checkpoint_may_be_named_from_the_output_folder(tmp_path: Path) -> None:
    flags = [*REQUIRED, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "earlier-run-1/checkpoint-9"]
    assert "resume_from_checkpoint: expected latest, a name or an existing folder" in refusal(*flags)
    (tmp_path / "earlier-run-1" / "checkpoint-9").mkdir(parents=True)
    load(flags)


def test_missing_config_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    for name, hint in (
        ("none.yml", ""),
        ("mien.yaml", f" Did you mean {tmp_path / 'mine.yaml'}?"),
        ("sdlx.yaml", " Did you mean sdxl?"),
    ):
        message = refusal("--config", str(tmp_path / name))
        assert message.startswith(
            f"--config {tmp_path / name}: expected a YAML file or a recipe (`rlr-peft config --list`)"
        )
        assert message.endswith(f"seen from {Path.cwd()}; correct it.{hint}")


def test_empty_yaml_file_is_no_settings(tmp_path: Path) -> None:
    assert load([*REQUIRED, "--config", write(tmp_path, "# nothing\n")]) == load(REQUIRED)


@pytest.mark.parametrize("text", ["hub_model_id: ''", "heldout_reward_fn: [a, ' ']", "reward_model_path: {a: ''}"])
def test_an_empty_name_in_a_file_is_an_error(tmp_path: Path, text: str) -> None:
    expected = f"{text.partition(':')[0]}: expected a text, got an empty one"
    assert expected in refusal("--config", write(tmp_path, text))
    assert load([*REQUIRED, "--negative_prompt", "", "--validation_prompt", ""]).validation.validation_prompt == ("",)


@pytest.mark.parametrize(
    "words", ["compare --adapter=", "plan --output=", "merge --base=", "card ", "diagnose --output="]
)
def test_an_empty_name_is_an_error_of_every_command(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words.split(" "))
    assert left.value.code == 2 and "got an empty one; fill it or leave" in capsys.readouterr().err


def test_a_text_with_a_nul_is_refused() -> None:
    with pytest.raises(ConfigError, match="negative_prompt: expected a text without control characters"):
        load([*REQUIRED, "--negative_prompt", "a\0b"])
