"""The knobs themselves: sentences, units and ranges; secrets; and what loading them costs."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rlr_peft.config import METHODS, Config, Knob, bounds_of, config_to_dict, knobs, save_config
from rlr_peft.config import load_config as load
from tests.config.loading import DEMO, REQUIRED, refusal


@pytest.mark.parametrize("knob", knobs().values(), ids=str(list(knobs())).strip("[]").replace("'", "").split(", "))
def test_every_knob_has_a_plain_sentence_and_numbers_a_range(knob: Knob) -> None:
    sentence: str = knob.field.metadata["sentence"]
    assert len(sentence.split()) >= 4
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    if {int, float} & set(knob.options):
        assert bounds_of(knob.field)
        assert knob.field.metadata["unit"] or knob.name in ("seed", "lora_alpha")


def test_every_group_is_documented_and_reachable() -> None:
    groups: dict[str, Any] = {knob.group: knob.group_title for knob in knobs().values()}
    assert list(groups) == [field.name for field in fields(Config)]
    assert all(": " in title for title in groups.values())


def test_demo_config_is_valid() -> None:
    config = load(["--config", str(DEMO)])
    assert config.model.pretrained_model_name_or_path == "tiny-shapes"
    assert config.reward.heldout_reward_fn not in (None, config.reward.reward_fn)
    assert config.validation.num_evaluation_images == 256


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


NUMBERS = [name for name, knob in knobs().items() if {int, float} & set(knob.options)]
FLOATS = [name for name in NUMBERS if float in knobs()[name].options]
ZERO_HAS_A_MEANING = {  # it turns something off, or is one end of the range
    *(
        "lora_dropout guidance_scale true_cfg_scale reward_server_retries fo_steps black_box_steps fo_coefficient"
    ).split(),
    *("fo_carry step_density step_correction evaluation_guidance_scale").split(),
    *("level_density old_decay old_decay_growth norm_penalty norm_margin base_pull old_pull").split(),
    *("ho_coefficient zo_coefficient calibration_decay zo_step_memory kl_beta seed lr_warmup_steps").split(),
    *("adam_beta1 adam_beta2 adam_weight_decay ema_decay reward_limit eta evaluation_eta ho_blocks").split(),
}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("-1", set(NUMBERS) - {"reward_limit"}),
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
    for method in METHODS:
        own = {name for name in names if not knobs()[name].methods or method in knobs()[name].methods}
        got = refusal("--estimator", method, *(f"--{name}={value}" for name in own)).splitlines()
        lines = {line.removeprefix("- ").split(":")[0]: line for line in got[1:]}
        assert all(len(line) < 300 for line in got)
        if value == "0":  # some knobs may be 0 with one method and not with another
            own -= {name for name in ZERO_HAS_A_MEANING if name in own}
            lines = {name: line for name, line in lines.items() if name not in ZERO_HAS_A_MEANING}
        assert set(lines) == own
        for name in own:
            declared = knobs()[name].methods.get(method, knobs()[name].field)
            bounds = bounds_of(declared)
            expected = "expected a finite number" if value[-1].isalpha() or value == "1e400" else "expected "
            assert expected in lines[name] and "; " in lines[name]
            assert value[-1].isalpha() or value == "1e400" or all(f"{word} " in lines[name] for word in bounds)


def test_zero_is_taken_where_it_has_a_meaning() -> None:
    """Each in its range; what they mean together is another question."""
    for method in ("rlr", "flowbp-bridge"):
        own = [name for name in ZERO_HAS_A_MEANING if not knobs()[name].methods or method in knobs()[name].methods]
        zero = [name for name in own if name != "fo_steps" or method == "rlr"]
        load([*REQUIRED, "--estimator", method, *(f"--{name}=0" for name in zero)])


@pytest.mark.parametrize("value", ["1e18", ".nan", "inf"])
def test_a_whole_number_is_digits(value: str) -> None:
    assert refusal(f"--rank={value}").startswith("rank: expected a whole number, got ")
    assert refusal(f"--max_train_steps={value}").startswith("max_train_steps: expected a whole number or null, got ")


def test_a_number_of_thousands_of_digits_is_refused_where_no_number_belongs_too() -> None:
    assert refusal(f"--reward_minimum={'9' * 6000}").startswith(
        "reward_minimum: expected a mapping of names to numbers"
    )
