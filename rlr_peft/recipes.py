"""What ships beside the code, in `configs/`: recipes, prompts and settings of quantisation, each known by its name."""

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


def first_comment(recipe: Path) -> str:
    """What a recipe says of itself in its first line."""
    with recipe.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def _files(pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(_FOLDER.glob(pattern))}
