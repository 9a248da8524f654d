"""Flags and YAML: values, their types, and the round trip through a saved file."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlr_peft.config import (
    ConfigError,
    RLRArguments,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    knobs,
    save_config,
)
from rlr_peft.config import load_config as load
from tests.config.loading import REQUIRED, refusal, write


def test_defaults_are_those_that_diffusers_users_know_or_measured() -> None:
    config = load(REQUIRED)
    assert config.lora.rank == 4
    assert config.training.train_batch_size == 4
    assert config.optimizer.learning_rate == "auto"
    assert config.optimizer.schedule == "warmup_stable_decay"
    assert config.checkpointing.checkpointing_steps is None
    assert config.chain.num_inference_steps == 50
    assert config.model.mixed_precision == "no"
    assert config.lora.lora_alpha is None


def test_flags_reach_their_groups_with_their_types() -> None:
    config = load(
        [
            *REQUIRED,
            *"--rank 8 --learning_rate 3e-3 --gradient_checkpointing --allow_tf32 false --fo_steps auto".split(),
            *"--estimator rlr --ho_start window --ho_window 30 40 --ho_blocks 1 --zo none".split(),
            *("--mixed_precision", "bf16"),
            *("--validation_prompt", "a cat: asleep, grey", "a dog", "--negative_prompt", ""),
        ]
    )
    assert config.lora.rank == 8
    assert config.optimizer.learning_rate == 3e-3
    assert config.model.gradient_checkpointing is True
    assert config.model.allow_tf32 is False
    assert isinstance(config.estimator, RLRArguments)
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
        "mixed_precision: no\nestimator: rlr\nlearning_rate: 1e-3\nuse_dora: true\nho_blocks: all\nnegative_prompt: ~\n"
        "adam_weight_decay: 0\nvalidation_prompt:\n  - 'a: b'\n  - c\nrevision: '12e4'\n",
    )
    config = load([*REQUIRED, "--config", path])
    assert config.model.mixed_precision == "no"
    assert config.optimizer.learning_rate == 1e-3
    assert config.lora.use_dora is True
    assert isinstance(config.estimator, RLRArguments) and config.estimator.ho_blocks == "all"
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
    path = write(
        tmp_path, "rank: 16\nestimator: rlr\nlearning_rate: 0.5\nho_window: [1, 2]\nuse_dora: true\nfo_steps: 3\n"
    )
    file = [f"--config={path}"] if joined else ["--config", path]
    flags = ["--rank", "2", "--ho_window", "null", "--use_dora", "false", "--fo_steps", "null"]
    config = load([*REQUIRED, *(file + flags if file_first else flags + file)])
    assert config.lora.rank == 2
    assert config.optimizer.learning_rate == 0.5
    assert config.lora.use_dora is False
    assert isinstance(config.estimator, RLRArguments) and config.estimator.fo_steps == "auto"
    assert config.estimator.ho_window is None


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


def test_saved_file_holds_every_knob_and_loads_equal(tmp_path: Path) -> None:
    config = load(
        [*REQUIRED, *"--estimator rlr --ho_start window --ho_blocks 1 --ho_window 3 9 --adam_epsilon 1e-11".split()]
    )
    path = tmp_path / "run" / "config.yaml"
    save_config(config, path)
    assert load(["--config", str(path)]) == config
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(knobs())
    save_config(load([*REQUIRED, "--rank", "5"]), path)
    assert load(["--config", str(path)]).lora.rank == 5
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_saved_file_means_the_same_to_a_yaml_1_1_reader(tmp_path: Path) -> None:
    config = load(
        [*REQUIRED, "--ho_blocks", "all", "--estimator", "rlr", "--revision", "12e4", "--negative_prompt", "off"]
    )
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
