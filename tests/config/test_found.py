"""A config that was found beside an adapter, which may be somebody else's."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlr_peft.config import knobs, read_found_config


def test_of_a_found_config_texts_are_taken_only_where_a_knob_says_so(tmp_path: Path) -> None:
    """All knobs at once, a word in each that takes a text; numbers and choices of fixed words pass."""
    words = {name: knob for name, knob in knobs().items() if knob.takes_text or knob.element_type is str}
    values: dict[str, Any] = {name: ["x"] if knob.element_type is str else "x" for name, knob in words.items()}
    values |= {"reward_model_path": {"a": "b"}, "reward_minimum": {"x": 1.0}, "rank": 8, "mixed_precision": "bf16"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    kept, left_out = read_found_config(tmp_path / "config.yaml", list(knobs()))
    assert set(left_out) == {
        *("attention_backend", "bnb_quantization_config_path", "cache_dir", "dcot_cache", "dcot_endpoint"),
        *("dcot_endpoint_model", "evaluation_prompt_path", "hub_token", "logging_dir", "output_dir", "prompt_path"),
        *(
            "init_adapter",
            "prompt_filter",
            "resume_from_checkpoint",
            "reward_model_path",
            "tracker_name",
            "vlm_answers",
            "vlm_endpoint",
            "vlm_question",
        ),
    }
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
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


def test_of_several_sources_of_prompts_the_harmless_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "secrets.txt").write_text("a cat")
    folder = tmp_path / "found"
    folder.mkdir()
    (folder / "data").mkdir()
    sources = {"simple-animals": 2.0, "owner/name": 1.0, str(tmp_path / "secrets.txt"): 1.0, str(folder / "data"): 1.0}
    (folder / "config.yaml").write_text(yaml.safe_dump({"prompt_path": sources}))
    kept = read_found_config(folder / "config.yaml", ["prompt_path"])
    assert kept == ({"prompt_path": {"simple-animals": 2.0, "owner/name": 1.0}}, ["prompt_path"])
