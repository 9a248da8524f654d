"""What a base is made of, read before any of it is loaded: a mistake in its place or its files is one sentence.

A base may be one `.safetensors` file, as sites for sharing models have it: weights under the keys of the original code.
diffusers converts them. What the file does not hold comes from a diffusers pipeline of the same family: configs and
tokenizers, and of the newer families text encoders and VAE.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    fetch_diffusers_config,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
    load_single_file_checkpoint,
)
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from rlr_peft.chain.families import models_of
from rlr_peft.chain.pipeline import refusal
from rlr_peft.config import ConfigError, ModelArguments
from rlr_peft.config.model import is_single_file
from rlr_peft.errors import UserError, did_you_mean
from rlr_peft.files import PlainFileError, parse_json, read_plain_text
from rlr_peft.foreign_text import listed
from rlr_peft.tiny_shapes import PIPELINE_NAME, pipeline_path

MODEL_INDEX = "model_index.json"
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
WEIGHTS = (".safetensors", ".bin")
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
SETTINGS: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
CONVERT = (
    "convert it once with diffusers, `StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)` (or the "
    "class of its family), and give the folder"
)
_ON_THE_HUB = {
    GatedRepoError: "is gated: accept its terms on the Hub and log in with `hf auth login`",
    RevisionNotFoundError: "has no such revision",
    RepositoryNotFoundError: "was not found, or is private: check the name, and log in with `hf auth login`",
    LocalEntryNotFoundError: "is not in the local cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set: check "
    "the name, or go online",
    EntryNotFoundError: f"has no {MODEL_INDEX}, so it is no diffusers pipeline",
}


class BaseModelError(ConfigError):
    """What was given as base is no pipeline that can be loaded."""


def read_model_index(name: str, *, revision: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """The checked `model_index.json` of a folder or a repository of the Hub.

    Raises:
        BaseModelError: it is not there, cannot be read, or names classes that neither diffusers nor transformers has.
            Code that comes with a base is never run.
    """
    path = Path(name)
    if os.path.exists(path):
        _check_place(name, path)
        file = path / MODEL_INDEX
    else:
        file = _download(name, revision, cache_dir)
    try:
        index = parse_json(read_plain_text(file))
    except PlainFileError as error:
        raise BaseModelError(f"The base {name}: {MODEL_INDEX} cannot be read: {error}; get the base again.") from error
    check_model_index(name, index)
    return index


def check_model_index(name: str, index: Any) -> None:
    """Raises a BaseModelError where the index names what cannot be loaded or driven, or needs code of its own."""
    if not isinstance(index, dict):
        raise BaseModelError(f"The base {name}: expected {MODEL_INDEX} to be a mapping, got {type(index).__name__}.")
    class_name = index.get("_class_name")
    if isinstance(class_name, list):
        raise BaseModelError(
            f"The base {name} needs a pipeline class of its own code, which is not run; take another base."
        )
    if not isinstance(class_name, str) or getattr(diffusers, class_name, None) is None:
        raise BaseModelError(
            f"The base {name}: expected a pipeline class of diffusers {diffusers.__version__} in {MODEL_INDEX}, got "
            f"{class_name!r}; correct the file or upgrade diffusers."
        )
    if (reason := refusal(getattr(diffusers, class_name))) is not None:
        raise BaseModelError(f"The base {name}: {class_name} cannot be driven as a chain: {reason}.")
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, (list, dict)):  # plain values are settings of the class
            continue
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str | None) for word in entry):
            raise BaseModelError(
                f"The base {name}: expected [library, class] for {part} in {MODEL_INDEX}, got {entry!r}."
            )
        _check_component(name, part, *entry)


@contextmanager
def loading_base(name: str, variant: str | None = None) -> Iterator[None]:
    """Inside, diffusers and transformers load a base; whatever they raise on its files is one sentence.

    Args:
        variant: of the files that are asked for.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kinds = _variants(Path(name))
        if only := {kind for of_part in kinds if None not in of_part for kind in of_part if kind}:
            words = ", ".join(sorted(only))
            raise BaseModelError(
                f"The base {name} has weights of the variant {words} only: give --variant {min(only)}."
            ) from error
        if kinds and variant is not None and not any(variant in of_part for of_part in kinds):
            others = sorted({f"give --variant {kind}" for of_part in kinds for kind in of_part if kind})
            advice = listed(["leave --variant out", *others], "or")
            raise BaseModelError(f"The base {name} has no weights of the variant {variant}: {advice}.") from error
        reason, advice = " ".join(str(error).split()) or type(error).__name__, "get it again, or take another."
        if isinstance(error, UnpicklingError) or "Unable to load weights" in reason:
            where = "" if isinstance(error, UnpicklingError) else f" ({reason[:200]})"
            reason = (
                "a file of weights is damaged, or a pickle that holds more than tensors and could run code, which is "
                f"not unpickled{where}"
            )
            advice = "take a base with .safetensors."
        raise BaseModelError(f"The base {name} cannot be loaded: {reason[:400].rstrip('.')}; {advice}") from error


def check_loaded(name: str, pipeline: Any) -> None:
    """Refuses a pipeline of which some weights came from no file.

    Raises:
        BaseModelError: a model has parameters without values.
    """
    for part, model in models_of(pipeline).items():
        missing = [key for key, value in model.named_parameters() if value.is_meta]
        if missing:
            raise BaseModelError(
                f"The base {name} lacks {len(missing)} tensors of its {part}, the first is {missing[0]}: the file is "
                "damaged, or of another model than its config says; get it again."
            )


def check_no_adapter(name: str, file: Path) -> None:
    """Raises a BaseModelError where a file is an adapter."""
    if _is_adapter(file):
        raise BaseModelError(
            f"The base {name} is a LoRA adapter: expected the pipeline that it was trained on; an adapter is given "
            "with --adapter (`compare`, `merge`) or --resume_from_checkpoint."
        )


def class_settings(pipeline_class: Any) -> dict[str, Any]:
    """What some pipeline classes take besides their models, and must be here; to others it would be unknown."""
    taken = inspect.signature(pipeline_class.__init__).parameters
    return {name: value for name, value in SETTINGS.items() if name in taken}


def _check_place(name: str, path: Path) -> None:
    """Says of a file or folder that is no pipeline what it is."""
    if not path.is_dir():
        if path.suffix not in SINGLE_FILES:
            raise BaseModelError(f"The base {name} is a file: expected the folder or Hub id of a diffusers pipeline.")
        check_no_adapter(name, path)
        raise BaseModelError(
            f"The base {name} is a single file: expected one of .safetensors, or a folder or Hub id of a diffusers "
            f"pipeline; {CONVERT}."
        )
    if (path / MODEL_INDEX).exists():
        return
    names = sorted(entry.name for entry in path.iterdir())
    inner = [place.parent for pattern in ("*", "snapshots/*") for place in path.glob(f"{pattern}/{MODEL_INDEX}")]
    files = [entry for entry in names if entry.endswith(SINGLE_FILES)]
    if not names:
        what = "is an empty folder"
    elif inner:
        what = f"holds a pipeline one level down: give {inner[0]}"
    elif any((path / place).is_file() and _is_adapter(path / place) for place in files):
        kind = "a checkpoint of a training run" if path.name.startswith("checkpoint-") else "a LoRA adapter"
        what = (
            f"holds {kind}, not the pipeline that it was trained on; --resume_from_checkpoint goes on from a checkpoint"
        )
    elif "config.json" in names:
        what = "holds one model, not a whole pipeline: give the folder above it, where the other parts are"
    elif files:
        what = f"holds single files ({files[0]}): {CONVERT}"
    else:
        what = f"holds {', '.join(names[:5])}"
    raise BaseModelError(f"The base {name} has no {MODEL_INDEX}, as a diffusers pipeline has; it {what}.")


def _is_adapter(file: Path) -> bool:
    """Whether a file of tensors holds LoRA layers, by its keys; of a pickle this is not looked at."""
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, "pt") as header:
            return any("lora" in key.lower() for key in header.keys())  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError):
        return False


def _download(name: str, revision: str | None, cache_dir: str | None) -> Path:
    try:
        return Path(hf_hub_download(name, MODEL_INDEX, revision=revision, cache_dir=cache_dir))
    except HFValidationError as error:
        raise BaseModelError(
            f"The base {name}: there is no such folder (looked for it from {Path.cwd()}), and it is no Hub id "
            f"`user/name`.{did_you_mean(name, [PIPELINE_NAME])}"
        ) from error
    except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        words = next(
            (text for kind, text in _ON_THE_HUB.items() if isinstance(error, kind)), f"cannot be read: {error}"
        )
        raise BaseModelError(
            f"The base {name}: there is no such folder here, and the Hub repository {words}."
            f"{did_you_mean(name, [PIPELINE_NAME])}"
        ) from error


def _check_component(name: str, part: str, library: str | None, class_name: str | None) -> None:
    if library is None or class_name is None or hasattr(diffusers.pipelines, library):
        return
    if library not in LIBRARIES:
        raise BaseModelError(
            f"The base {name} takes its {part} from {library}.{class_name}, code that is neither diffusers nor "
            "transformers and is not run; take another base."
        )
    if not hasattr(LIBRARIES[library], class_name):
        raise BaseModelError(
            f"The base {name} needs {library}.{class_name} for its {part}, which the installed {library} "
            f"{LIBRARIES[library].__version__} does not have; upgrade it."
        )


def _variants(folder: Path) -> list[set[str | None]]:
    """Of each model of a local base the variants of its weights, such as fp16; None for those of no variant."""
    found = []
    for part in folder.iterdir() if folder.is_dir() else ():
        names = [file.name for file in part.iterdir() if file.suffix in WEIGHTS] if part.is_dir() else []
        # diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
        kinds = {name.split(".")[1].split("-")[0] if name.count(".") > 1 else None for name in names}
        found += [kinds] if kinds else []
    return found


# What keys of a VAE start with.
VAE_KEYS = ("first_stage_model.", "vae.")


def place_of_configs(arguments: ModelArguments) -> str:
    """Folder or Hub id of the diffusers pipeline that has the base's configs: the base itself but of a single file.

    Raises:
        BaseModelError: the file is an adapter, or its keys do not tell its family.
    """
    name = arguments.pretrained_model_name_or_path
    if name == PIPELINE_NAME:
        return str(pipeline_path())
    if not is_single_file(name):
        return name
    check_no_adapter(name, Path(name))
    if arguments.single_file_config is not None:
        return arguments.single_file_config
    with loading_base(name):
        return str(fetch_diffusers_config(load_single_file_checkpoint(name))["pretrained_model_name_or_path"])


def load_single_file(arguments: ModelArguments, dtype: torch.dtype, replaced: dict[str, Any]) -> DiffusionPipeline:
    """The pipeline of a single file.

    Args:
        replaced: parts that are used in place of the file's.

    Raises:
        BaseModelError: the file or the configs cannot be read, or a part is in neither.
    """
    name, configs = arguments.pretrained_model_name_or_path, place_of_configs(arguments)
    try:
        index = read_model_index(configs, revision=arguments.revision, cache_dir=arguments.cache_dir)
    except BaseModelError as error:
        raise BaseModelError(
            f"The base {name} needs the configs of its family: {error} Give --single_file_config a folder or Hub id."
        ) from error
    pipeline_class: Any = getattr(diffusers, index["_class_name"])
    if not hasattr(pipeline_class, "from_single_file"):
        raise BaseModelError(
            f"The base {name}: diffusers reads no single files of {index['_class_name']}; give a folder."
        )
    with loading_base(name):
        with safe_open(name, "pt") as file:
            has_vae = any(key.startswith(VAE_KEYS) for key in file.keys())  # noqa: SIM118 (it is no dictionary)
        if "vae" in index and not has_vae and "vae" not in replaced:
            raise BaseModelError(
                f"The base {name} has no VAE in it: give --pretrained_vae_model_name_or_path, such as {configs}/vae."
            )
        where: dict[str, Any] = {"revision": arguments.revision, "cache_dir": arguments.cache_dir}
        pipeline: DiffusionPipeline = pipeline_class.from_single_file(
            name,
            config=configs,
            dtype=dtype,
            **where,
            **class_settings(pipeline_class),
            **_missing_text_encoders(name, index, configs, dtype=dtype, **where),
            **replaced,
        )
    return pipeline


def _missing_text_encoders(name: str, index: Mapping[str, Any], configs: str, **loading: Any) -> dict[str, Any]:
    """The text encoders that the file does not hold, from the pipeline that has its configs.

    diffusers would load them itself, but sees only weights under names that transformers no longer saves.
    """
    weights = load_single_file_checkpoint(name)
    found = {}
    for part, entry in index.items():
        if part.startswith("text_encoder") and entry[0] == "transformers":
            kind = getattr(transformers, entry[1])
            holds_t5 = issubclass(kind, transformers.T5EncoderModel) and is_t5_in_single_file(weights)
            if not (holds_t5 or is_clip_model_in_single_file(kind, weights)):
                found[part] = kind.from_pretrained(configs, subfolder=part, **loading)
    return found
