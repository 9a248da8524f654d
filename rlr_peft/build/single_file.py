"""A base in one `.safetensors` file, as sites for sharing models have it: weights under the keys of the original code.

diffusers converts them. What the file does not hold comes from a diffusers pipeline of the same family: configs and
tokenizers, and of the newer families text encoders and VAE.
"""

from collections.abc import Mapping
from pathlib import Path
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
from safetensors import safe_open

from rlr_peft.chain.base_files import (
    BaseModelError,
    check_no_adapter,
    class_settings,
    loading_base,
    read_model_index,
)
from rlr_peft.config import ModelArguments
from rlr_peft.config.model import is_single_file
from rlr_peft.tiny_shapes import PIPELINE_NAME, pipeline_path

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
