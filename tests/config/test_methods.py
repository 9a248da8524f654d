"""A config holds the knobs of its method and no others: which those are, and what is said about the rest."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from rlr_peft.config import (
    METHODS,
    ConfigError,
    DDPOArguments,
    GRPOArguments,
    RLRArguments,
    RLRPaperArguments,
    config_from_dict,
    config_to_dict,
    knobs,
    save_config,
)
from rlr_peft.config import load_config as load
from tests.config.loading import DEMO, REQUIRED, refusal, write


@pytest.mark.parametrize("method", METHODS)
def test_the_class_of_the_method_has_the_defaults_of_its_preset(method: str) -> None:
    estimator = load([*REQUIRED, "--estimator", method]).estimator
    assert type(estimator) is METHODS[method] and estimator == METHODS[method]() and estimator.estimator == method


def test_the_presets_are_those_of_old() -> None:
    rlr, paper = RLRArguments(), RLRPaperArguments()
    assert (rlr.fo_steps, rlr.ho_length, rlr.ho_blocks, rlr.zo, rlr.black_box_steps) == (
        "auto",
        1,
        "all",
        "none",
        "auto",
    )
    assert (paper.fo_steps, paper.ho_length, paper.ho_blocks, paper.zo, paper.black_box_steps) == (
        *(1, 2, 1, "two-point", 0),
    )
    assert (DDPOArguments().inner_epochs, GRPOArguments().inner_epochs) == (2, 1)


def test_the_published_settings_of_grpo_that_the_documentation_names_are_taken() -> None:
    text = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text(encoding="utf-8")
    table = text.split("**Published settings of `grpo`**")[1].split("`--config sd35_medium_grpo`")[0]
    flags = {
        row.split("|")[1].split("(")[0].strip(): [
            word for span in re.findall("`(--[^`]*)`", row.split("|")[2]) for word in span.split()
        ]
        for row in re.findall(r"^ +\|.*\|$", table, re.M)[2:]
    }
    assert list(flags) == ["Flow-GRPO", "Flow-GRPO-Fast, SD3.5 and FLUX", "MixGRPO", "GRPO-Guard", "Flow-DPPO", "GDPO"]
    fast = flags["Flow-GRPO-Fast, SD3.5 and FLUX"]
    given = {"--kl_beta": ["0.1"], "--divergence_limit": ["1"]}  # they depend on the reward and on the size
    for name, words in flags.items():
        base = [] if name.startswith("Flow-GRPO") or name == "MixGRPO" else fast
        flat = [part for word in words for part in (word, *given.get(word, ()))]
        rewards = ["--reward_fn", "{jpeg-compressibility: 1, tiny-shapes: 1}"]
        assert load([*REQUIRED, *rewards, "--estimator", "grpo", *base, *flat]).chain.eta in (0.7, 0.8), name


@pytest.mark.parametrize("name", [name for name, knob in knobs().items() if knob.methods])
def test_a_flag_is_taken_by_the_methods_that_have_it_and_refused_by_the_others(name: str) -> None:
    """With a value that is no default, whatever the method."""
    odd = {"ho_window": "2 3", "zo": "one-point", "ho_start": "window", "step_choice": "inverse-variance"}
    odd |= {"fo_roulette": "false", "advantage_std": "update"}
    value = odd.get(
        name, "true" if bool in knobs()[name].options else "0.25" if float in knobs()[name].options else "7"
    )
    for method in METHODS:
        if method in knobs()[name].methods:
            fitting = METHODS[method](**{name: knobs()[name].read(value.split() if name == "ho_window" else value)})
            assert getattr(fitting, name) != getattr(METHODS[method](), name)
        else:
            got = refusal("--estimator", method, f"--{name}", *value.split())
            assert got.startswith(f"{name}: expected none with {method}, got ")
            assert got.endswith(".") and all(
                other in got.split("use --estimator ")[1] for other in knobs()[name].methods
            )


def test_null_is_the_methods_own_default(tmp_path: Path) -> None:
    of_methods = {name: None for name, knob in knobs().items() if knob.methods}
    for method in METHODS:
        values = {**config_to_dict(load(REQUIRED)), **of_methods, "estimator": method}
        assert config_from_dict(values).estimator == METHODS[method]()


@pytest.mark.parametrize("method", METHODS)
def test_a_printed_config_names_every_knob_and_says_null_for_those_of_other_methods(
    method: str, tmp_path: Path
) -> None:
    config = load([*REQUIRED, "--estimator", method])
    values = config_to_dict(config)
    own = {field.name for field in fields(config.estimator)}
    assert list(values) == list(knobs())
    assert all(values[name] is None for name, knob in knobs().items() if knob.methods and name not in own)
    save_config(config, tmp_path / "config.yaml")
    assert load(["--config", str(tmp_path / "config.yaml")]) == config
    for other in METHODS:  # what is only the default of one method is no wish for another
        taken_over = load(["--config", str(tmp_path / "config.yaml"), "--estimator", other])
        assert taken_over.estimator == METHODS[other]()


EARLIER = """\
estimator: {method}
fo_steps: null
step_choice: crossing
ho_length: null
ho_blocks: null
ho_start: null
ho_window: null
zo: null
zo_scale: 0.02
zo_samples: 1
black_box_steps: null
state_baseline: false
antithetic: false
fo_coefficient: 1.0
ho_coefficient: 1.0
zo_coefficient: 1.0
normalize_rewards: false
inner_epochs: null
clip_range: 0.1
advantage_clip: 5.0
per_prompt_stat_tracking_buffer_size: 32
per_prompt_stat_tracking_min_count: 16
dpo_beta: 0.3
calibration_interval: 50
calibration_samples: 16
calibration_decay: 0.5
nfe_budget: null
memory_budget: null
ho_step_memory: null
zo_step_memory: null
optimizer: AdamW
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_an_earlier_version_saved_still_loads(method: str, tmp_path: Path) -> None:
    """It held every knob, whatever the method; numbers that tune a part which the method lacks are passed over."""
    path = write(tmp_path, EARLIER.format(method=method))
    estimator = load([*REQUIRED, "--config", path]).estimator
    changed = {"zo_scale": 0.02, "clip_range": 0.1, "dpo_beta": 0.3, "calibration_interval": 50, "advantage_clip": 5.0}
    own = {name: value for name, value in changed.items() if name in METHODS[method].knobs()}
    assert estimator == METHODS[method](**own)


@pytest.mark.parametrize("method", METHODS)
def test_the_demos_recipe_serves_every_method(method: str) -> None:
    assert load(["--config", str(DEMO), "--estimator", method]).estimator.estimator == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "estimator: full-bp\nho_blocks: 1",
            "ho_blocks: expected none with full-bp, got 1; use --estimator rlr, rlr-",
        ),
        ("estimator: ddpo\nstate_baseline: true", "state_baseline: expected none with ddpo, got true; use --estimator"),
        (
            "normalize_rewards: true",
            "normalize_rewards: expected no such knob any more, got true; write `reward_fn: {NA",
        ),
        ("optimizer: SGD", "optimizer: expected AdamW or Adafactor or Lion or Muon or Prodigy, got 'SGD'; write "),
        (
            "estimator: dpo",
            "estimator: expected auto or rlr or rlr-paper or full-bp or truncated-bp or draft-lv or drtune or",
        ),
    ],
)
def test_what_a_file_asks_for_in_vain_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal("--config", write(tmp_path, text))


def test_values_of_a_program_are_held_against_the_types(tmp_path: Path) -> None:
    values = {"pretrained_model_name_or_path": "tiny-shapes", "prompt_path": "tiny-shapes/train", "reward_fn": "a"}
    assert config_from_dict({**values, "validation_prompt": ["a", "b"]}).validation.validation_prompt == ("a", "b")
    with pytest.raises(ConfigError, match=r"^reward_fn: expected a mapping of names to numbers or a text, got <built"):
        config_from_dict({**values, "reward_fn": len})
    kinds = "a mapping of names to numbers or a text or null"
    with pytest.raises(ConfigError, match=rf"^prompt_path: expected {kinds}, got \['a cat'\]; correct it.$"):
        config_from_dict({**values, "prompt_path": ["a cat"]})
    with pytest.raises(ConfigError, match=r"^rank: expected a whole number, got True; correct it.$"):
        config_from_dict({**values, "rank": True})
