"""What the tests of the configuration share: a base that loads, and the message of one that does not."""

from pathlib import Path

import pytest

from rlr_peft.config import ConfigError
from rlr_peft.config import load_config as load

REQUIRED = [
    *("--pretrained_model_name_or_path", "tiny-shapes"),
    *("--prompt_path", "tiny-shapes/train"),
    *("--reward_fn", "tiny-shapes"),
]
DEMO = Path(__file__).parents[2] / "configs" / "tiny_shapes.yaml"


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([*REQUIRED, *argv])
    return str(caught.value)
