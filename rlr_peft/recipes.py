"""What ships beside the code, in `configs/`: recipes, prompts and settings of quantisation, each known by its name."""

import re
from itertools import takewhile
from pathlib import Path

_FOLDER = Path(__file__).parent / "configs"


def recipes() -> dict[str, Path]:
    """Training configs by name: `--config sdxl`."""
    return _files("*.yaml")


def prompt_sets() -> dict[str, Path]:
    """Files of prompts by name: `--prompt_path scenes`."""
    return _files("prompts/*.txt")


def quantizations() -> dict[str, Path]:
    """Arguments of BitsAndBytesConfig by name: `--bnb_quantization_config_path nf4`."""
    return _files("quantization/*.json")


def first_sentence(recipe: Path) -> str:
    """What a recipe says of itself in the first sentence of the comment that it begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def _files(pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(_FOLDER.glob(pattern))}
