"""What a pipeline is made of: the configs of its components, shipped, from a local folder or from the Hub.

Weights are never fetched. The shipped ones are facts about public checkpoints; their parameter counts are tested.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from rlr_peft.chain.base_files import MODEL_INDEX, check_model_index, read_model_index
from rlr_peft.durable_files import stays_inside
from rlr_peft.errors import UserError
from rlr_peft.plain_files import read_plain_text

SCHEDULER_CONFIG = "scheduler_config.json"
CONFIG = "config.json"
MAX_CONFIG_BYTES = 2**25  # tokenizers list their added tokens


class ArchitectureError(UserError, ValueError):
    """A pipeline whose configs cannot be found or understood."""


@dataclass(frozen=True)
class Architecture:
    """The configs of a pipeline.

    Attributes:
        name: Hub id or folder name.
        model_index: the pipeline's class and, for each component, its library and class.
        components: each component's config; tokenizers have ``model_max_length`` at the most.
    """

    name: str
    model_index: Mapping[str, Any]
    components: Mapping[str, Mapping[str, Any]]


def find_architecture(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> Architecture:
    """The configs of a local folder, of a shipped checkpoint, or of a Hub repository, looked for in this order.

    Raises:
        ArchitectureError: there is no such folder or repository, or it cannot be reached.
    """
    folder = Path(name_or_path)
    if folder.exists():
        return _read(folder.name, lambda file: folder / file, read_model_index(name_or_path))
    shipped = _shipped().get(name_or_path)
    if shipped is not None:
        return Architecture(name_or_path, shipped["model_index"], shipped["components"])
    index = _json(_fetch(name_or_path, MODEL_INDEX, revision, cache_dir))
    check_model_index(name_or_path, index)
    return _read(name_or_path, lambda file: _fetch(name_or_path, file, revision, cache_dir), index)


def find_component(name_or_path: str, cache_dir: str | None = None) -> Mapping[str, Any]:
    """The config of a single model, such as a VAE that replaces the pipeline's own.

    Raises:
        ArchitectureError: there is no such folder or repository, or it cannot be reached.
    """
    if Path(name_or_path).is_dir():
        return _json(Path(name_or_path) / CONFIG)
    shipped = _shipped().get(name_or_path)
    return shipped["config"] if shipped is not None else _json(_fetch(name_or_path, CONFIG, None, cache_dir))


def shipped_ids() -> list[str]:
    """Hub ids of the pipelines whose configs come with the package."""
    return sorted(name for name, entry in _shipped().items() if "model_index" in entry)


def _shipped() -> dict[str, dict[str, Any]]:
    folder = files("rlr_peft.evaluation.memory_plan") / "architectures"
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir() if file.name.endswith(".json")]
    return {name: entry for entry in entries for name in entry["ids"]}


def _read(name: str, locate: Any, model_index: Mapping[str, Any]) -> Architecture:
    components: dict[str, Mapping[str, Any]] = {}
    for part, entry in model_index.items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            continue
        if not stays_inside(part):
            raise ArchitectureError(f"Expected the names of components in {MODEL_INDEX} of {name}, got {part!r}.")
        if "Tokenizer" in entry[1]:
            components[part] = _json(locate(f"{part}/tokenizer_config.json"))
        elif "Scheduler" in entry[1]:
            components[part] = _json(locate(f"{part}/{SCHEDULER_CONFIG}"))
        elif "Processor" not in entry[1] and part != "safety_checker":
            components[part] = _json(locate(f"{part}/{CONFIG}"))
    return Architecture(name, model_index, components)


def _fetch(name: str, file: str, revision: str | None, cache_dir: str | None) -> Path:
    folder, _, filename = file.rpartition("/")
    try:
        return Path(hf_hub_download(name, filename, subfolder=folder or None, revision=revision, cache_dir=cache_dir))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ArchitectureError(
            f"Expected {file} of {name}, a local folder or a Hub repository, and could not get it "
            f"({type(error).__name__}). Give a folder, go online, or plan with one of the checkpoints whose configs "
            f"come with rlr-peft: {', '.join(shipped_ids())}."
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_plain_text(Path(path), MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"Expected a JSON config at {path}: {error}.") from error
    if not isinstance(content, dict):
        raise ArchitectureError(f"Expected a JSON object at {path}, got something else; check the folder of the base.")
    return content
