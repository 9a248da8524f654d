"""A source of prompts that is not there: the nearest one is named, before anything asks the Hub."""

from pathlib import Path

import pytest

from rlr_peft.config import ConfigError, load_config, nearest_source
from rlr_peft.errors import did_you_mean

BASE = ["--pretrained_model_name_or_path", "tiny-shapes", "--reward_fn", "tiny-shapes"]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "captions").mkdir(parents=True)
    (tmp_path / "data" / "captions" / "train.jsonl").touch()
    (tmp_path / "cats.txt").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("source", "nearest"),
    [
        ("tiny-shapes/trian", "tiny-shapes/train"),
        ("unseen_scene", "unseen_scenes"),
        ("cat.txt", "cats.txt"),
        ("data/captons", "data/captions"),
        ("./data/captons/", "data/captions"),
        ("dta/captions", "data/captions"),
        ("data/captions/trian.jsonl", "data/captions/train.jsonl"),
        ("dta/other", "data"),
        ("owner/name", None),
    ],
)
def test_the_nearest_name_or_path_is_found(source: str, nearest: str | None) -> None:
    assert nearest_source(source) == nearest


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (
            "--dataset_name data/captons",
            "dataset_name: expected a Hub id or an existing folder, got data/captons, seen",
        ),
        ("--dataset_name data/captons", "; write data/captions if you mean that."),
        ("--dataset_name tiny-shapes/trian", "; write --prompt_path tiny-shapes/train if you mean that."),
        ("--dataset_name cats.txt", "; write --prompt_path cats.txt if you mean that."),
        ("--prompt_path cat.txt", "; write cats.txt if you mean that."),
        ('--prompt_path {"scenes":1,"data/captons":1}', "; write data/captions if you mean that."),
    ],
)
def test_a_mistyped_source_is_refused_with_the_nearest(flags: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([*BASE, *flags.split()])
    assert hint in str(caught.value)


@pytest.mark.parametrize("source", ["dta/other", "captions", "cat", "owner/name"])
def test_what_may_be_on_the_hub_is_asked_for(source: str) -> None:
    """Half of a path, or one name alone, is like much."""
    assert load_config([*BASE, "--dataset_name", source]).prompts.dataset_name == source


def test_other_paths_and_names_that_are_not_there() -> None:
    """Of a base, an adapter, a reward's file and a config the messages end with the same words."""
    assert did_you_mean("data/captons") == " Did you mean data/captions?"
    assert did_you_mean("tiny-shape", ["tiny-shapes"]) == " Did you mean tiny-shapes?"
    assert did_you_mean("owner/name", ["tiny-shapes"]) == ""
