"""The configuration: flags and YAML, the errors a person meets, and the round trip through a saved file."""

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlr_peft.cli.main import main
from rlr_peft.config import Config, ConfigError, config_from_dict, config_to_dict, config_to_yaml, save_config
from rlr_peft.config import load_config as load
from rlr_peft.config.arguments import Knob, knobs
from rlr_peft.config.found import read_found_config
from rlr_peft.config.parsing import element_type, takes_text

REQUIRED = [
    *("--pretrained_model_name_or_path", "tiny-shapes"),
    *("--prompt_path", "tiny-shapes/train"),
    *("--reward_fn", "tiny-shapes"),
]
DEMO = Path(__file__).parent.parent / "configs" / "tiny_shapes.yaml"


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([*REQUIRED, *argv])
    return str(caught.value)


# --- values -----------------------------------------------------------------------------------------------------------


def test_defaults_are_those_that_diffusers_users_know() -> None:
    config = load(REQUIRED)
    assert config.lora.rank == 4
    assert config.training.train_batch_size == 4
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.lr_scheduler == "constant"
    assert config.checkpointing.checkpointing_steps == 500
    assert config.chain.num_inference_steps == 50
    assert config.model.mixed_precision == "no"
    assert config.lora.lora_alpha is None


def test_flags_reach_their_groups_with_their_types() -> None:
    config = load(
        [
            *REQUIRED,
            *"--rank 8 --learning_rate 3e-3 --gradient_checkpointing --allow_tf32 false --fo_steps auto".split(),
            *"--ho_start window --ho_window 30 40 --ho_blocks 1 --zo none --mixed_precision bf16".split(),
            *("--validation_prompt", "a cat: asleep, grey", "a dog", "--negative_prompt", ""),
        ]
    )
    assert config.lora.rank == 8
    assert config.optimizer.learning_rate == 3e-3
    assert config.model.gradient_checkpointing is True
    assert config.model.allow_tf32 is False
    assert config.estimator.fo_steps == "auto"
    assert config.estimator.ho_window == (30, 40)
    assert config.estimator.ho_blocks == 1
    assert config.estimator.zo == "none"
    assert config.model.mixed_precision == "bf16"
    assert config.validation.validation_prompt == ("a cat: asleep, grey", "a dog")
    assert config.chain.negative_prompt == ""


def test_yaml_values_have_the_same_names_and_types(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "mixed_precision: no\nlearning_rate: 1e-3\nuse_dora: true\nho_blocks: all\nnegative_prompt: ~\n"
        "adam_weight_decay: 0\nvalidation_prompt:\n  - 'a: b'\n  - c\nrevision: '12e4'\n",
    )
    config = load([*REQUIRED, "--config", path])
    assert config.model.mixed_precision == "no"
    assert config.optimizer.learning_rate == 1e-3
    assert config.lora.use_dora is True
    assert config.estimator.ho_blocks == "all"
    assert config.chain.negative_prompt is None
    assert config.optimizer.adam_weight_decay == 0.0
    assert isinstance(config.optimizer.adam_weight_decay, float)
    assert config.validation.validation_prompt == ("a: b", "c")
    assert config.model.revision == "12e4"


def test_one_validation_prompt_needs_no_list(tmp_path: Path) -> None:
    path = write(tmp_path, "validation_prompt: a red star\n")
    assert load([*REQUIRED, "--config", path]).validation.validation_prompt == ("a red star",)


@pytest.mark.parametrize("file_first", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_flags_win_over_yaml_wherever_they_stand(tmp_path: Path, file_first: bool, joined: bool) -> None:
    path = write(tmp_path, "rank: 16\nlearning_rate: 0.5\nho_window: [1, 2]\nuse_dora: true\nfo_steps: 3\n")
    file = [f"--config={path}"] if joined else ["--config", path]
    flags = ["--rank", "2", "--ho_window", "null", "--use_dora", "false", "--fo_steps", "null"]
    config = load([*REQUIRED, *(file + flags if file_first else flags + file)])
    assert config.lora.rank == 2
    assert config.optimizer.learning_rate == 0.5
    assert config.estimator.ho_window is None
    assert config.lora.use_dora is False
    assert config.estimator.fo_steps is None


def test_required_knobs_may_come_from_either(tmp_path: Path) -> None:
    path = write(tmp_path, "pretrained_model_name_or_path: m\nreward_fn: tiny-shapes\n")
    assert load(["--config", path, "--prompt_path", "tiny-shapes/test"]).model.pretrained_model_name_or_path == "m"
    with pytest.raises(
        ConfigError, match="prompt_path: expected one source of prompts, got none; give --prompt_path or --dataset_name"
    ):
        load(["--config", path])


def test_config_is_frozen_and_hashable() -> None:
    config = load([*REQUIRED, "--validation_prompt", "a", "b"])
    assert hash(config) == hash(load([*REQUIRED, "--validation_prompt", "a", "b"]))
    assert config != load([*REQUIRED, "--seed", "1"])
    with pytest.raises(FrozenInstanceError):
        config.lora.rank = 5  # type: ignore[misc]


def test_several_rewards_are_a_mapping_in_flags_and_yaml_alike(tmp_path: Path) -> None:
    weights = {"pickscore": 1.0, "my rewards.py:sharp": 0.5, "http://127.0.0.1:8000/": -2.0}
    flags = ["--reward_fn", json.dumps(weights), "--reward_minimum", "{pickscore: 20}"]
    flags += ["--reward_model_path", "{yuvalkirstain/PickScore_v1: /models/pick score}"]
    path = write(
        tmp_path,
        "reward_fn:\n  pickscore: 1\n  my rewards.py:sharp: 0.5\n  http://127.0.0.1:8000/: -2\n"
        "reward_minimum:\n  pickscore: 20\nreward_model_path:\n  yuvalkirstain/PickScore_v1: /models/pick score\n",
    )
    config = load([*REQUIRED, *flags])
    assert config.reward.reward_fn == weights and config.reward.reward_minimum == {"pickscore": 20.0}
    assert load([*REQUIRED[:4], "--config", path]) == config and hash(config) != hash(load(REQUIRED))
    save_config(config, tmp_path / "saved.yaml")
    assert load(["--config", str(tmp_path / "saved.yaml")]) == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    taken_back = load(
        ["--config", str(tmp_path / "saved.yaml"), "--reward_minimum", "null", "--reward_fn", "clipscore"]
    )
    assert taken_back.reward.reward_minimum is None and taken_back.reward.reward_fn == "clipscore"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward_fn: {a: x}", "reward_fn: expected a mapping of names to numbers or a text, got {'a': 'x'}"),
        ("reward_fn: [a, b]", "reward_fn: expected a mapping of names to numbers or a text, got ['a', 'b']"),
        ("reward_minimum: {a: }", "reward_minimum: expected a mapping of names to numbers or null, got {'a': None}"),
        ("reward_minimum: 3", "reward_minimum: expected a mapping of names to numbers or null, got 3"),
        ("reward_model_path: here", "reward_model_path: expected a mapping of names to texts or null, got 'here'"),
        ("reward_fn: {a: 1, a: 2}", "a is given twice"),
    ],
)
def test_a_wrong_mapping_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    got = refusal("--config", write(tmp_path, text))
    assert message in got and "\n" not in got


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saved_file_holds_every_knob_and_loads_equal(tmp_path: Path) -> None:
    config = load([*REQUIRED, *"--ho_start window --ho_blocks 1 --ho_window 3 9 --adam_epsilon 1e-11".split()])
    path = tmp_path / "run" / "config.yaml"
    save_config(config, path)
    assert load(["--config", str(path)]) == config
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(knobs())
    save_config(load([*REQUIRED, "--rank", "5"]), path)
    assert load(["--config", str(path)]).lora.rank == 5
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_saved_file_means_the_same_to_a_yaml_1_1_reader(tmp_path: Path) -> None:
    config = load([*REQUIRED, "--zo", "none", "--revision", "12e4", "--negative_prompt", "off"])
    assert yaml.safe_load(config_to_yaml(config)) == config_to_dict(config)


awkward_text = st.one_of(
    st.sampled_from(
        ["no", "null", "~", "12e4", "1_000", "0x1f", "2020-01-01", "a: b", "- x", "#", "'", '"', "1:30", "é 日"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip),
)


@settings(max_examples=25)
@given(text=awkward_text, prompts=st.lists(awkward_text, min_size=1), rate=st.floats(1e-300, 10))
def test_any_text_and_number_survives_saving(
    tmp_path_factory: pytest.TempPathFactory, text: str, prompts: list[str], rate: float
) -> None:
    values = config_to_dict(load(REQUIRED))
    values.update(negative_prompt=text, validation_prompt=prompts, learning_rate=rate)
    config = config_from_dict(values)
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    assert load(["--config", str(path)]) == config


def test_dict_form_is_plain_and_invertible() -> None:
    config = load([*REQUIRED, "--validation_prompt", "a", "b"])
    values = config_to_dict(config)
    assert values["validation_prompt"] == ["a", "b"]
    assert config_from_dict(json.loads(json.dumps(values))) == config


# --- names and types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--rnk", "rank"), ("--learning-rate", "learning_rate"), ("--lr_schedular=cosine", "lr_scheduler")],
)
def test_unknown_flag_suggests_the_nearest(flag: str, nearest: str) -> None:
    assert f"did you mean {nearest}?" in refusal(flag, "1")


def test_unknown_yaml_name_suggests_the_nearest_and_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "rank: 3\nnum_inference_step: 4\n")
    message = refusal("--config", path)
    assert message == f"--config {path}: unknown name num_inference_step; did you mean num_inference_steps?"


def test_unknown_name_like_nothing_points_to_help() -> None:
    assert "see --help" in refusal("--zzzzzzzz")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rank four", "rank: expected a whole number, got four; write --rank VALUE."),
        ("--rank 4.5", "rank: expected a whole number, got 4.5; write --rank VALUE."),
        ("--rank null", "rank: expected a whole number, got null; write --rank VALUE."),
        ("--learning_rate fast", "learning_rate: expected a number, got fast; write --learning_rate VALUE."),
        ("--mixed_precision fp8", "mixed_precision: expected no or fp16 or bf16, got fp8"),
        ("--use_dora maybe", "use_dora: expected true or false, got maybe"),
        ("--fo_steps most", "fo_steps: expected a whole number or auto or random or null, got most"),
        ("--lr_scheduler sawtooth", "lr_scheduler: expected linear or cosine or"),
        ("--optimizer SGD", "optimizer: expected AdamW, got SGD"),
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
        ("dcot_fractions: [1, x]", "dcot_fractions: expected numbers or null, got [1.0, 'x']"),
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
    assert "cannot be read (No such file or directory)" in refusal("--config", str(tmp_path / "none.yaml"))


def test_empty_yaml_file_is_no_settings(tmp_path: Path) -> None:
    assert load([*REQUIRED, "--config", write(tmp_path, "# nothing\n")]) == load(REQUIRED)


# --- combinations -----------------------------------------------------------------------------------------------------

REFUSED = [
    ("--train_batch_size 3", "num_images_per_prompt: expected a divisor of the 3 samples"),
    ("--train_batch_size 0", "train_batch_size: expected at least 1 and at most 4096, got 0"),
    ("--gradient_accumulation_steps=-1", "gradient_accumulation_steps: expected at least 1 and at most 100000, got -1"),
    ("--zo_scale 0", "zo_scale: expected above 0 and at most 1000, got 0.0"),
    ("--learning_rate .nan", "learning_rate: expected a finite number"),
    ("--max_grad_norm .inf", "max_grad_norm: expected a finite number"),
    ("--lora_dropout 1", "lora_dropout: expected at least 0 and below 1, got 1.0"),
    ("--num_images_per_prompt 1", "num_images_per_prompt: expected 2 or more with rlr"),
    ("--num_images_per_prompt 1 --estimator reinforce", "num_images_per_prompt: expected 2 or more with reinforce"),
    ("--eta 0", "estimator: expected noise in the chain for the score terms of rlr, got eta 0.0"),
    ("--step_kind ode --estimator reinforce", "score terms of reinforce, got step_kind ode"),
    ("--step_kind ode --black_box_steps 50", "expected noise in the chain"),
    ("--eta 1.5", "eta: expected 0 to 1 with step_kind ancestral, got 1.5"),
    ("--fo_steps 51", "fo_steps: expected at most num_inference_steps (50), got 51"),
    ("--black_box_steps 51", "black_box_steps: expected at most num_inference_steps (50), got 51"),
    ("--estimator full-bp --fo_steps 3", "fo_steps: expected 50 (every step) with full-bp, got 3"),
    ("--estimator truncated-bp --fo_steps auto", "fo_steps: expected a number of 1 or more with truncated-bp"),
    ("--estimator truncated-bp --fo_steps 0", "fo_steps: expected a number of 1 or more with truncated-bp"),
    ("--estimator reinforce --fo_steps 1", "fo_steps: expected 0 with reinforce"),
    ("--estimator full-bp --black_box_steps 2", "black_box_steps: expected none with full-bp"),
    (
        "--ho_length auto --memory_budget 8",
        "ho_step_memory: expected a larger number than zo_step_memory",
    ),
    (
        "--ho_length auto --memory_budget 8 --ho_step_memory 1 --zo_step_memory 1",
        "ho_step_memory: expected a larger number than zo_step_memory beside memory_budget, got 1.0 and 1.0",
    ),
    ("--estimator full-bp --ho_blocks 1", "ho_blocks: expected none with full-bp"),
    ("--estimator truncated-bp --ho_length 2", "ho_length: expected none with truncated-bp"),
    ("--estimator reinforce --ho_length 2", "ho_length: expected 1 with reinforce"),
    ("--ho_start window --ho_blocks 1", "ho_window: expected together with ho_start window, got ho_start window and"),
    ("--ho_window 1 2", "ho_window: expected together with ho_start window"),
    ("--ho_start window --ho_blocks 1 --ho_window 0 5", "ho_window: expected two steps a b with 1 <= a <= b"),
    ("--ho_start window --ho_blocks 1 --ho_window 9 51", "num_inference_steps (50), got 9 51"),
    ("--ho_start window --ho_blocks 1 --ho_window 9 5", "ho_window: expected two steps a b"),
    ("--ho_start window --ho_blocks 1 --ho_window 9", "ho_window: expected two steps a b"),
    ("--ho_start window --ho_blocks 1 --ho_window 2 9 --fo_steps 3", "expected steps above the 3 last ones"),
    ("--ho_start uniform", "ho_start: expected a number of ho_blocks to draw, got ho_blocks all"),
    ("--fo_steps 45 --ho_length 6", "ho_length: expected at most 5 (num_inference_steps 50 minus 45"),
    ("--estimator rlr-paper --ho_length 50", "ho_length: expected at most 49"),
    ("--ho_length auto", "ho_length: expected a budget beside auto, got none"),
    ("--ho_length 2 --nfe_budget 100", "nfe_budget: expected only with ho_length auto, got ho_length 2"),
    ("--zo one-point", "ho_blocks: expected 0 or 1 with a zeroth-order term (one-point zo)"),
    ("--zo two-point --ho_blocks 1", "fo_steps: expected a number beside a zeroth-order term (two-point zo)"),
    ("--zo two-point --ho_blocks 2", "ho_blocks: expected 0 or 1 with a zeroth-order term (two-point zo)"),
    ("--estimator rlr-paper --ho_blocks all", "ho_blocks: expected 0 or 1 with a zeroth-order term (the preset's zo)"),
    ("--estimator full-bp --zo one-point", "zo: expected none with full-bp"),
    ("--ho_blocks 0", "fo_steps: expected a number with ho_blocks 0, got auto, which needs score terms"),
    ("--ho_blocks 0 --fo_steps 3 --ho_length 2", "ho_length: expected none with ho_blocks 0"),
    ("--estimator ddpo --ho_blocks 0", "ho_blocks: expected steps to train or none of this knob with ddpo, got 0"),
    ("--estimator grpo --fo_steps 2", "fo_steps: expected 0 with grpo"),
    ("--estimator refl --fo_steps auto", "fo_steps: expected a number of 1 or more with refl, got auto"),
    ("--estimator refl --fo_steps 0", "fo_steps: expected a number of 1 or more with refl, got 0"),
    ("--estimator refl --fo_steps random", "fo_steps: expected a number with refl, got random"),
    ("--estimator full-bp --fo_steps random", "fo_steps: expected 50 (every step) with full-bp, got random"),
    ("--fo_steps random", "fo_steps: expected a number or auto with rlr, got random; use --estimator truncated-bp"),
    ("--estimator ddpo --black_box_steps 2", "black_box_steps: expected none with ddpo, got 2"),
    ("--estimator refl --black_box_steps 2", "black_box_steps: expected none with refl, got 2"),
    ("--step_choice inverse-variance --fo_steps 3", "step_choice: expected crossing where K is given"),
    ("--step_choice inverse-variance --ho_length 2", "step_choice: expected crossing"),
    ("--step_choice inverse-variance --ho_blocks 2", "step_choice: expected crossing"),
    ("--step_choice inverse-variance --state_baseline", "step_choice: expected crossing"),
    ("--step_choice inverse-variance --fo_steps 2 --zo two-point --ho_blocks 1", "step_choice: expected crossing"),
    ("--step_choice inverse-variance --estimator reinforce", "step_choice: expected crossing"),
    ("--estimator refl --ho_blocks 1", "ho_blocks: expected none with refl (no half-order term), got 1"),
    ("--estimator ddpo --ho_length 2", "ho_length: expected 1 with ddpo, got 2"),
    ("--estimator grpo --ho_blocks 2 --ho_start gradient-norm", "ho_start: expected uniform or window with grpo"),
    ("--estimator d3po --zo one-point", "zo: expected none with d3po, got one-point"),
    ("--estimator ddpo --eta 0", "estimator: expected noise in the chain for the score terms of ddpo"),
    ("--estimator d3po --step_kind ode", "estimator: expected noise in the chain for the score terms of d3po"),
    ("--inner_epochs 2", "inner_epochs: expected none with rlr, whose samples serve one optimiser step, got 2"),
    ("--estimator full-bp --state_baseline", "state_baseline: expected false with full-bp, got true"),
    ("--estimator grpo --state_baseline", "state_baseline: expected false with grpo, got true"),
    ("--estimator ddpo --normalize_rewards", "normalize_rewards: expected false with ddpo, whose gradient"),
    ("--estimator refl --fo_coefficient 2", "fo_coefficient: expected 1 with refl, got 2"),
    ("--estimator grpo --ho_coefficient 0.5", "ho_coefficient: expected 1 with grpo, got 0.5"),
    ("--zo_coefficient=-1", "zo_coefficient: expected at least 0 and at most 1000000, got -1.0"),
    (
        "--per_prompt_stat_tracking_min_count 33",
        "per_prompt_stat_tracking_min_count: expected at most per_prompt_stat_tracking_buffer_size (32), got 33",
    ),
    ("--estimator ddpo --antithetic", "antithetic: expected false with ddpo, got true"),
    ("--antithetic --num_images_per_prompt 2", "an even num_images_per_prompt of 4 or more, got 4 and 2"),
    (
        "--antithetic --train_batch_size 3 --gradient_accumulation_steps 4",
        "antithetic: expected pairs, that is an even train_batch_size",
    ),
    ("--estimator d3po --num_images_per_prompt 1", "num_images_per_prompt: expected pairs with d3po"),
    (
        "--estimator d3po --train_batch_size 3 --gradient_accumulation_steps 2 --num_images_per_prompt 2",
        "num_images_per_prompt: expected pairs with d3po, that is an even number beside an even train_batch_size",
    ),
    ("--estimator grpo --num_images_per_prompt 1", "num_images_per_prompt: expected 2 or more with grpo"),
    ("--estimator full-bp --eta 0 --kl_beta 0.1", "kl_beta: expected noise in the chain, without which"),
    ("--estimator full-bp --eta 0 --kl_interval 5", "kl_interval: expected noise in the chain"),
    ("--estimator full-bp --step_kind ode --kl_limit 5", "kl_limit: expected noise in the chain"),
    ("--ho_start window --ho_blocks 1 --ho_window 1 b", "ho_window: expected two steps a b with 1 <= a <= b"),
    ("--ho_start window --ho_blocks 1 --ho_window fine", "ho_window: expected two steps a b, since stages have names"),
    ("--dcot_rules --ho_start window --ho_blocks 1 --ho_window hands", "stages of coarse, mid, fine instead of hands"),
    ("--dcot_rules --ho_start window --ho_blocks 1 --fo_steps 20 --ho_window fine", "expected steps above the 20 last"),
    ("--dcot_rules --estimator grpo --ho_start window --ho_blocks 1 --ho_window auto", "got auto; use --estimator rlr"),
    ("--dcot_rules --dcot_columns a b c", "dcot_columns: expected one source of stage prompts, got dcot_columns and"),
    ("--dcot_fractions 0.5 0.5", "dcot_fractions: expected only with a source of stage prompts, got none"),
    ("--dcot_columns a b --dcot_fractions 0.5 0.4", "dcot_fractions: expected fractions above 0 that sum to 1"),
    ("--dcot_columns a b --num_inference_steps 1", "dcot_fractions: expected at least one of the 1 steps"),
    ("--dcot_columns a b --dcot_stages x y z", "dcot_columns: expected one column for each of 3 stages, got a b"),
    ("--dcot_model m --dcot_stages layout prompt", "dcot_stages: expected other names than prompt, which the file of"),
    ("--dcot_rules --dcot_stages a b", "dcot_stages: expected coarse mid fine with dcot_rules, got a b"),
    ("--dcot_endpoint http://localhost:1/v1", "dcot_endpoint_model: expected together with dcot_endpoint, got None"),
    ("--dataset_name d", "prompt_path: expected one source of prompts, got tiny-shapes/train and dataset_name d"),
    ("--streaming", "streaming: expected only with a dataset_name, got True"),
    ("--negative_prompt_column n --negative_prompt ugly", "negative_prompt_column: expected only without negative_"),
    ("--validation_split_percentage 100", "validation_split_percentage: expected above 0 and below 100, got 100"),
    (
        "--validation_split_percentage 5 --evaluation_prompt_path tiny-shapes/test",
        "validation_split_percentage: expected only without evaluation_prompt_path",
    ),
    ("--early_stopping_steps 20", "early_stopping_steps: expected a heldout_reward_fn to watch, got none"),
    ("--early_stopping_steps 4", "early_stopping_steps: expected at least 5 and at most 1000000000, got 4"),
    ("--lr_warmup_steps 5", "lr_warmup_steps: expected 0 with lr_scheduler constant, got 5"),
    ("--lr_scheduler cosine --lr_warmup_steps 5 --max_train_steps 4", "expected at most max_train_steps (4), got 5"),
    ("--heldout_reward_fn tiny-shapes", "heldout_reward_fn: expected another reward than reward_fn"),
    ("--heldout_reward_fn a b a", "heldout_reward_fn: expected different rewards, got a b a"),
    ("--reward_fn {a:,b:1} --heldout_reward_fn b", 'mapping of names to numbers, got {"a": null, "b:1": null}'),
    ("--reward_fn={}", "reward_fn: expected finite weights, not all 0, got {}"),
    ('--reward_minimum {"pickscore":20}', "reward_minimum: expected a name of reward_fn (tiny-shapes), got pick"),
    ("--reward_server_timeout 0", "reward_server_timeout: expected above 0 and at most 86400, got 0.0"),
    ("--reward_minimum_penalty 0", "reward_minimum_penalty: expected above 0 and at most 1000000, got 0.0"),
    ("--logging_dir ../logs", "logging_dir: expected a relative folder inside output_dir"),
    ("--logging_dir /logs", "logging_dir: expected a relative folder inside output_dir"),
    ("--tracker_name ../../x", "tracker_name: expected a relative folder inside output_dir, got ../../x; drop the"),
    ("--tracker_name /x", "tracker_name: expected a relative folder inside output_dir"),
    ("--tracker_name ..\\..\\x", "tracker_name: expected a relative folder inside output_dir"),
    ("--revision ../../x", "revision: expected a branch, tag or commit of the repository, got '../../x'"),
    ("--hub_revision ../../x", "hub_revision: expected a branch, tag or commit of the repository, got '../../x'"),
    ("--variant ../x", "variant: expected a word of a file name such as fp16, got '../x'"),
    ("--output_dir pyproject.toml/x", "output_dir: expected a folder or a place for one"),
    ("--prompt_path nowhere.txt", "prompt_path: expected an existing text file"),
    ("--evaluation_prompt_path tiny-shapes/all", "evaluation_prompt_path: expected an existing text file"),
    ("--resume_from_checkpoint some/checkpoint-3", "resume_from_checkpoint: expected latest, a name or an existing"),
    ("--output_dir=", "output_dir: expected a text, got an empty one"),
    ("--tracker_name=", "tracker_name: expected a text, got an empty one"),
    ("--heldout_reward_fn=", "heldout_reward_fn: expected a text, got an empty one"),
    ("--config=", "config: expected a text, got an empty one"),
    ("--bnb_quantization_config_path nowhere.json", "bnb_quantization_config_path: expected a JSON file, got nowhere"),
    ("--bnb_quantization_config_path README.md", "bnb_quantization_config_path: expected a JSON file, got README.md"),
    ("--offload --torch_compile", "torch_compile: expected weights that stay where they are, got offload"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[argv for argv, _ in REFUSED])
def test_impossible_combination_says_expected_got_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, argv: str, message: str
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    got = refusal(*argv.split())
    assert message in got
    assert "\n" not in got, "one problem must be one line"
    assert re.fullmatch(r"\w+: expected .*, got .*; .+\.", got)


ALLOWED = [
    "--estimator full-bp --eta 0 --num_images_per_prompt 1",
    "--estimator truncated-bp --step_kind ode --fo_steps 4",
    "--fo_steps 50 --step_kind ode --num_images_per_prompt 1",
    "--estimator rlr-paper",
    "--estimator rlr-paper --zo none --ho_blocks 3 --ho_start gradient-norm",
    "--estimator rlr-paper --ho_length auto --nfe_budget 100",
    "--ho_length auto --memory_budget 8 --ho_step_memory 1 --zo_step_memory 0.5",
    "--fo_steps 2 --black_box_steps 3 --reward_fn jpeg-compressibility",
    "--estimator reinforce --step_kind flow-sde --eta 1.3",
    "--step_kind cps --eta 0.7",
    "--fo_steps 2 --ho_length 48",
    "--ho_start window --ho_blocks 1 --ho_window 50 50",
    "--dcot_rules --ho_start window --ho_blocks 1 --ho_window fine",
    "--dcot_rules --ho_start window --ho_blocks 1 --fo_steps 5 --ho_window coarse mid",
    "--dcot_columns a b --dcot_fractions 0.25 0.75 --ho_start window --ho_blocks 1 --ho_window auto",
    "--dcot_endpoint http://localhost:1/v1 --dcot_endpoint_model m --dcot_cache stages.jsonl",
    "--prompt_path null --dataset_name d --streaming --max_train_steps 5 --caption_column caption",
    "--prompt_path simple-animals/train --evaluation_prompt_path simple-animals/test",
    "--metadata_columns a b --validation_split_percentage 5",
    "--train_batch_size 2 --gradient_accumulation_steps 2",
    "--lr_scheduler constant_with_warmup --lr_warmup_steps 5",
    "--resume_from_checkpoint checkpoint-20",
    "--estimator ddpo --num_images_per_prompt 1 --ho_blocks 5",
    "--estimator grpo --inner_epochs 2 --kl_beta 0.1 --step_kind flow-sde",
    "--estimator d3po --num_images_per_prompt 2 --ho_blocks 2 --ho_start window --ho_window 2 9",
    "--estimator refl --fo_steps 10 --eta 0 --num_images_per_prompt 1 --normalize_rewards",
    "--estimator truncated-bp --fo_steps random --step_kind ode --num_images_per_prompt 1",
    "--step_choice inverse-variance --antithetic --normalize_rewards --black_box_steps 3",
    "--fo_steps 2 --state_baseline --antithetic --ho_coefficient 0.5",
    "--heldout_reward_fn jpeg-compressibility --early_stopping_steps 5 --kl_limit 10",
    "--heldout_reward_fn jpeg-compressibility aesthetic --reward_dtype bf16 --offload_rewards",
    "--estimator rlr-paper --ho_blocks 0 --num_images_per_prompt 1",
    "--estimator full-bp --kl_beta 0.1 --kl_steps all",
]


def test_a_quantised_base_takes_one_width_and_no_dora(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text('{"bnb_4bit_quant_type": "nf4"}')
    argv = ["--bnb_quantization_config_path", str(path)]
    assert "expected an object with load_in_4bit or load_in_8bit true, got neither" in refusal(*argv)
    path.write_text('{"load_in_4bit": true, "load_in_8bit": true}')
    assert "got load_in_4bit and load_in_8bit" in refusal(*argv)
    path.write_text('{"load_in_4bit": true}')
    assert load([*REQUIRED, *argv]).model.bnb_quantization_config_path == str(path)
    assert "use_dora: expected a base in full width" in refusal(*argv, "--use_dora")
    assert "torch_compile: expected a base without bitsandbytes layers" in refusal(*argv, "--torch_compile")


@pytest.mark.parametrize("argv", ALLOWED)
def test_possible_combination_is_accepted(argv: str) -> None:
    assert isinstance(load([*REQUIRED, *argv.split()]), Config)


def test_several_problems_are_told_in_one_error() -> None:
    got = refusal(*"--train_batch_size 3 --eta 0 --ho_length 99".split())
    assert got.splitlines()[0] == "3 problems in the configuration:"
    assert len(got.splitlines()) == 4


@pytest.mark.parametrize("name", ["prompt_path", "evaluation_prompt_path", "output_dir", "resume_from_checkpoint"])
@pytest.mark.parametrize("path", ["a red ball on a table " * 20, "~nobody-of-that-name/x"], ids=["long", "home"])
def test_a_path_that_the_system_refuses_is_no_traceback(name: str, path: str) -> None:
    """A prompt in place of its file, for example, is longer than a file's name may be."""
    value = f"{path}/x" if name == "resume_from_checkpoint" else path
    if name == "output_dir":
        load([*REQUIRED, f"--{name}", value])  # it may be made yet
    else:
        assert refusal(*REQUIRED, f"--{name}", value).startswith(f"{name}: expected ")


def test_prompt_file_may_be_any_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n", encoding="utf-8")
    assert load([*REQUIRED, "--prompt_path", str(path)]).prompts.prompt_path == str(path)


# --- the knobs themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knob", knobs().values(), ids=str(list(knobs())).strip("[]").replace("'", "").split(", "))
def test_every_knob_has_a_plain_sentence_and_numbers_a_range(knob: Knob) -> None:
    sentence: str = knob.field.metadata["sentence"]
    assert len(sentence.split()) >= 4
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    is_number = any(type_ in (int, float) for type_ in (knob.type, *getattr(knob.type, "__args__", ())))
    if is_number:
        assert any(bound is not None for bound in knob.field.metadata["bounds"].values())
        assert knob.field.metadata["unit"] or knob.name in ("seed", "lora_alpha")


def test_every_group_is_documented_and_reachable() -> None:
    groups: dict[str, Any] = {knob.group: knob.group_title for knob in knobs().values()}
    assert list(groups) == [field.name for field in fields(Config)]
    assert all(": " in title for title in groups.values())


def test_demo_config_is_valid() -> None:
    config = load(["--config", str(DEMO)])
    assert config.model.pretrained_model_name_or_path == "tiny-shapes"
    assert config.reward.heldout_reward_fn not in (None, config.reward.reward_fn)
    assert config.validation.num_evaluation_images >= 256


def test_no_model_library_is_imported() -> None:
    """A refusal must not wait for torch: the whole check runs without it, and for `--help` within a second."""
    program = (
        "import sys; from rlr_peft.config import load_config, config_to_yaml; "
        f"config_to_yaml(load_config({REQUIRED!r})); "
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'accelerate', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_token_is_never_shown_or_written(tmp_path: Path) -> None:
    config = load([*REQUIRED, "--push_to_hub", "--hub_token", "hf_secret"])
    assert config.hub.hub_token == "hf_secret"
    save_config(config, tmp_path / "config.yaml")
    for text in (repr(config), str(config_to_dict(config)), (tmp_path / "config.yaml").read_text()):
        assert "hf_secret" not in text


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


def test_publishing_of_checkpoints_needs_checkpoints() -> None:
    with pytest.raises(ConfigError, match="push_every: expected push_to_hub"):
        load([*REQUIRED, "--push_every", "500"])
    with pytest.raises(ConfigError, match=r"push_every: expected a multiple of checkpointing_steps \(500\)"):
        load([*REQUIRED, "--push_to_hub", "--push_every", "750"])


def test_of_a_found_config_texts_are_taken_only_where_a_knob_says_so(tmp_path: Path) -> None:
    """All knobs at once, a word in each that takes a text; numbers and choices of fixed words pass."""
    words = {name: knob for name, knob in knobs().items() if takes_text(knob, "x") or element_type(knob) is str}
    values: dict[str, Any] = {name: ["x"] if element_type(knob) is str else "x" for name, knob in words.items()}
    values |= {"reward_model_path": {"a": "b"}, "reward_minimum": {"x": 1.0}, "rank": 8, "mixed_precision": "bf16"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    kept, left_out = read_found_config(tmp_path / "config.yaml", list(knobs()))
    assert set(left_out) == {
        *("attention_backend", "bnb_quantization_config_path", "cache_dir", "dcot_cache", "dcot_endpoint"),
        *("dcot_endpoint_model", "evaluation_prompt_path", "hub_token", "logging_dir", "output_dir", "prompt_path"),
        *("resume_from_checkpoint", "reward_model_path", "tracker_name"),
    }
    assert kept == {name: value for name, value in values.items() if name not in left_out}


@pytest.mark.parametrize(
    ("name", "harmless", "harmful"),
    [
        ("reward_fn", "pickscore", "evil.py:f"),
        ("reward_fn", "hpsv2/v2.1", "os:system"),
        ("reward_fn", "tiny-shapes/color", "http://127.0.0.1:1/"),
        ("pretrained_model_name_or_path", "user/name", "https://host/model"),
        ("pretrained_model_name_or_path", "../base", "\\\\host\\share"),
        ("pretrained_vae_model_name_or_path", "/models/vae", "//host/share"),
        ("dataset_name", "user/name", "../data"),
        ("dataset_name", "name", "https://host/data.csv"),
        ("prompt_path", "tiny-shapes/test", "/etc/hostname"),
        ("prompt_path", "FOLDER/prompts.txt", "FOLDER/link.txt"),
        ("evaluation_prompt_path", "FOLDER/prompts.txt", "FOLDER/../secret.txt"),
    ],
)
def test_of_a_found_config_what_is_harmless(name: str, harmless: str, harmful: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "prompts.txt").write_text("a cat")
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    for text, is_kept in ((harmless, True), (harmful, False)):
        value = text.replace("FOLDER", str(folder))
        (folder / "config.yaml").write_text(yaml.safe_dump({name: value}))
        kept, left_out = read_found_config(folder / "config.yaml", [name])
        assert (kept, left_out) == (({name: value}, []) if is_kept else ({}, [name]))


def test_a_text_with_a_nul_is_refused() -> None:
    with pytest.raises(ConfigError, match="negative_prompt: expected a text without control characters"):
        load([*REQUIRED, "--negative_prompt", "a\0b"])


NUMBERS = [name for name, knob in knobs().items() if {int, float} & {knob.type, *getattr(knob.type, "__args__", ())}]
FLOATS = [name for name in NUMBERS if float in {knobs()[name].type, *getattr(knobs()[name].type, "__args__", ())}]
ZERO_HAS_A_MEANING = {  # it turns something off, or is one end of the range
    *(
        "lora_dropout guidance_scale true_cfg_scale reward_server_retries fo_steps black_box_steps fo_coefficient"
    ).split(),
    *("ho_coefficient zo_coefficient calibration_decay zo_step_memory kl_beta seed lr_warmup_steps").split(),
    *("adam_beta1 adam_beta2 adam_weight_decay eta evaluation_eta ho_blocks").split(),
}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("-1", set(NUMBERS)),
        (str(10**19), set(NUMBERS)),
        ("9" * 299, set(NUMBERS)),
        ("0", set(NUMBERS) - ZERO_HAS_A_MEANING),
        (".nan", set(FLOATS)),
        ("-.inf", set(FLOATS)),
        ("1e400", set(FLOATS)),
    ],
)
def test_every_number_out_of_all_reason_is_refused_with_its_range(value: str, names: set[str]) -> None:
    """All in one message, a line each, before torch is imported, as `test_no_model_library_is_imported` shows."""
    got = refusal(*(f"--{name}={value}" for name in names)).splitlines()
    lines = {line.removeprefix("- ").split(":")[0]: line for line in got[1:]}
    assert all(len(line) < 300 for line in got)
    assert set(lines) == names
    for name in names:
        bounds = {word: bound for word, bound in knobs()[name].field.metadata["bounds"].items() if bound is not None}
        expected = "expected a finite number" if value[-1].isalpha() or value == "1e400" else "expected "
        assert expected in lines[name] and "; " in lines[name]
        assert value[-1].isalpha() or value == "1e400" or all(f"{word} " in lines[name] for word in bounds)


def test_zero_is_taken_where_it_has_a_meaning() -> None:
    """Each in its range; what they mean together is another question."""
    load([*REQUIRED, *(f"--{name}=0" for name in ZERO_HAS_A_MEANING)])


@pytest.mark.parametrize("value", ["1e18", ".nan", "inf"])
def test_a_whole_number_is_digits(value: str) -> None:
    assert refusal(f"--rank={value}").startswith("rank: expected a whole number, got ")
    assert refusal(f"--max_train_steps={value}").startswith("max_train_steps: expected a whole number or null, got ")
