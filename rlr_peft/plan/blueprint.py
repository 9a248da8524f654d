"""A pipeline built from its configs alone: on the meta device it holds no bytes, on a real one random weights.

The configs are shipped, in a local folder, or on the Hub. Weights are never fetched. The shipped configs are facts
about public checkpoints; their parameter counts are tested. Meta tensors have no values, but pipelines look at some:
`KnownValues` keeps those that follow from the host.
"""

import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from transformers import BatchEncoding

from rlr_peft.chain.base_files import MODEL_INDEX, check_model_index, read_model_index
from rlr_peft.chain.families import family_of_class
from rlr_peft.errors import UserError
from rlr_peft.files import read_plain_text, stays_inside

SCHEDULER_CONFIG = "scheduler_config.json"
CONFIG = "config.json"
MAX_CONFIG_BYTES = 2**25  # tokenizers list their added tokens
# What some pipeline classes take besides their models, and what it must be here.
ABSENT = ("safety_checker", "feature_extractor")
# ... and those of adapters that draw from pictures; where the pipeline itself does, they are there.
OF_IMAGES = ("image_encoder", "image_processor")
# Masks, token ids and timesteps are small; of larger tensors, such as latents, nothing is remembered.
LARGEST = 8192  # elements
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


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
    if os.path.exists(folder):
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
    folder = files("rlr_peft.plan") / "architectures"
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


class BlankTokenizer:
    """Stands in for a tokenizer, whose vocabulary is no small file: every prompt is as long as may be."""

    bos_token_id, eos_token_id, pad_token_id, pad_token = 0, 1, 1, ""
    added_tokens_encoder: Mapping[str, int] = {}

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(self, text: Any, max_length: int | None = None, padding: Any = False, **_: Any) -> BatchEncoding:
        """Ids (B, L) and a mask of ones."""
        count = 1 if isinstance(text, str) else len(text)
        # Pipelines pad to the longest prompt only to see what they had to cut off.
        length = max_length or (1 if padding == "longest" else self.model_max_length)
        ids = torch.zeros(count, length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def encode(self, text: str, **_: Any) -> list[int]:
        """An id for every word and every mark: of an instruction, whose length is its own."""
        return [0] * len(re.findall(r"\w+|[^\w\s]", text))

    def apply_chat_template(self, conversation: list[dict[str, str]], **_: Any) -> str:
        """The messages' texts, which are as long as may be in any template."""
        return "\n".join(message["content"] for message in conversation)

    def tokenize(self, text: str) -> list[str]:
        """Nothing: there are no added tokens to look for."""
        return []

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        """What was cut off: nothing."""
        return [""] * len(ids)


class BlankImageProcessor:
    """Stands in for what scales pictures for their encoder, to a height and width of `size`."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, images: Any, **_: Any) -> BatchEncoding:
        """Pixels (1, 3, size, size)."""
        return BatchEncoding({"pixel_values": torch.zeros(1, 3, self._size, self._size)})


def build_pipeline(
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    replaced: Mapping[str, nn.Module | None] | None = None,
) -> DiffusionPipeline:
    """The pipeline with weights as they are initialised, in eval mode, without safety checker, frozen.

    Args:
        device: meta for weights without bytes.
        dtype: of all weights, except of a VAE that overflows in half precision (as in training).
        replaced: parts in place of its own; None leaves one out.

    Raises:
        ArchitectureError: a class that the installed libraries do not have.
    """
    pipeline_class = getattr(diffusers, architecture.model_index["_class_name"], None)
    if pipeline_class is None:
        raise ArchitectureError(
            f"Expected a pipeline class of diffusers {diffusers.__version__}, got "
            f"{architecture.model_index['_class_name']} for {architecture.name}; upgrade diffusers."
        )
    parts: dict[str, Any] = dict(replaced or {})
    with _quiet():
        for name, entry in architecture.model_index.items():
            if name not in parts and not name.startswith("_"):
                parts[name] = _component(name, entry, architecture, device, dtype) if isinstance(entry, list) else entry
        pipeline: DiffusionPipeline = pipeline_class(**_accepted(pipeline_class, parts))
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    vae = getattr(pipeline, "vae", None)
    if vae is not None and dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_model(
    config: Mapping[str, Any], class_name: str, device: torch.device, dtype: torch.dtype, library: Any = diffusers
) -> nn.Module:
    """One diffusers model from its config, frozen, in eval mode.

    Args:
        library: diffusers, or the module of a pipeline that has models of its own.
    """
    model_class = getattr(library, class_name)
    with _quiet(), _made_in(dtype), device:
        model: nn.Module = model_class.from_config(dict(config))
    # As loading does: what comes from a file has the dtype, except what the class wants in float32.
    saved = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if name in saved and buffer.is_floating_point():
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, buffer.to(dtype))  # its data alone would keep what it is a view of
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(getattr(model, "_keep_in_fp32_modules", None) or ()):
            parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def _component(
    name: str, entry: list[Any], architecture: Architecture, device: torch.device, dtype: torch.dtype
) -> Any:
    library, class_name = entry
    family = family_of_class(architecture.model_index["_class_name"])
    needs_image = family is not None and family.needs_image
    if library is None or name in ABSENT or (name in OF_IMAGES and not needs_image):
        return None
    config = architecture.components.get(name, {})
    if name == "image_processor":
        return BlankImageProcessor(architecture.components["image_encoder"]["image_size"])
    if "Processor" in class_name:
        if name in getattr(diffusers, architecture.model_index["_class_name"])._optional_components:
            return None
        raise ArchitectureError(
            f"{architecture.model_index['_class_name']} cannot be planned: its text encoder reads pictures through "
            f"{class_name}. Start it with a small --max_train_steps and read the peak memory in its metrics instead."
        )
    if "Tokenizer" in class_name:
        return BlankTokenizer(min(int(config.get("model_max_length", 512)), 512))
    if library == "diffusers":
        if "Scheduler" in class_name:
            return getattr(diffusers, class_name).from_config(dict(config))
        return build_model(config, class_name, device, dtype)
    if hasattr(own := getattr(diffusers.pipelines, library, None), class_name):
        return build_model(config, class_name, device, dtype, own)
    model_class = getattr(transformers, class_name, None)
    if library != "transformers" or model_class is None:
        raise ArchitectureError(
            f"Expected a class of diffusers or transformers for {name} of {architecture.name}, got "
            f"{library}.{class_name}."
        )
    with _made_in(dtype), device:
        model = model_class(model_class.config_class(**config))
    if device.type == "meta":
        model.register_forward_pre_hook(_drop_mask, with_kwargs=True)
    return model


def _drop_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """transformers looks into a mask, and a meta tensor has nothing to see; the blank tokenizer's says nothing."""
    return args[:1], {name: value for name, value in kwargs.items() if name != "attention_mask"}


def _accepted(pipeline_class: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    required, optional = pipeline_class._get_signature_keys(pipeline_class)
    wanted = {"requires_safety_checker": False, "add_watermarker": False} | dict(parts)
    return {name: wanted.get(name) for name in required} | {name: wanted[name] for name in optional if name in wanted}


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new weights have this dtype, as in loading: a large model never exists in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Building from a config warns of what loading would do."""
    loggers = [importlib.import_module(f"{library}.utils.logging") for library in ("diffusers", "transformers")]
    levels = [library.get_verbosity() for library in loggers]
    for library in loggers:
        library.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        for library, level in zip(loggers, levels, strict=True):
            library.set_verbosity(level)


class KnownValues(TorchFunctionMode):
    """Inside, meta tensors that were made of host values alone keep these beside, as far as they are small.

    Looking at such a tensor (`item`, `bool`, `tolist`, `nonzero`, indexing with a mask) gives what a real device would.
    Where nothing is known it fails as ever. Tensors that require grad are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: Any = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function on the tensors, and on their values where all are known."""
        kwargs = kwargs or {}
        if func in INDEXING:
            args = (args[0], self._places(args[1]), *args[2:])
        on_host = None if self._is_unknown(args, kwargs) else self._on_host(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            if on_host is None:
                raise
            if func is Tensor.cpu or any(_names(leaf, "cpu") for leaf in tree_leaves((args, kwargs))):
                return on_host[0]
            result = tree_map(_without_values, on_host[0])
        if func is Tensor.__iter__ and on_host is not None:
            return self._rows(args[0], on_host[0])
        if on_host is None:
            self._forget_changed(func, args)
        elif func is not Tensor.__setitem__:
            self._remember(result, on_host[0])
        return result

    def _is_unknown(self, args: Any, kwargs: Any) -> bool:
        """Whether values are missing, or no meta tensor is concerned at all."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(tensor.is_meta for tensor in tensors) and not any(_names(leaf, "meta") for leaf in leaves):
            return True
        return any(
            tensor.requires_grad or tensor.numel() > LARGEST or (tensor.is_meta and tensor not in self._values)
            for tensor in tensors
        )

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The function's result on the values; None where the host cannot tell."""

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_meta:
                return self._values[leaf]
            return torch.device("cpu") if _names(leaf, "meta") else leaf

        try:
            return (func(*tree_map(value, args), **tree_map(value, kwargs)),)
        except (RuntimeError, NotImplementedError, IndexError, TypeError):
            return None

    def _remember(self, result: Any, values: Any) -> None:
        for made, value in zip(tree_leaves(result), tree_leaves(values), strict=False):
            fits = isinstance(made, Tensor) and isinstance(value, Tensor) and made.shape == value.shape
            if fits and made.is_meta and made.numel() <= LARGEST and not value.is_meta:
                self._values[made] = value

    def _rows(self, tensor: Tensor, values: Iterator[Tensor]) -> Iterator[Tensor]:
        for row, value in zip(tensor.unbind(0), values, strict=True):
            self._remember(row, value)
            yield row

    def _forget_changed(self, func: Any, args: Any) -> None:
        """What was changed in place by something unknown is unknown."""
        name = getattr(func, "__name__", "")
        changes = func is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__"))
        if changes and args and isinstance(args[0], Tensor):
            self._values.pop(args[0], None)

    def _places(self, index: Any) -> Any:
        """An index in which masks that are known are the places where they are true."""
        parts = index if isinstance(index, tuple) else (index,)
        places: list[Any] = []
        for part in parts:
            if isinstance(part, Tensor) and part.is_meta and part.dtype == torch.bool and part in self._values:
                places += [_without_values(place) for place in self._values[part].nonzero(as_tuple=True)]
            else:
                places.append(part)
        return tuple(places) if isinstance(index, tuple) or len(places) != 1 else places[0]


def _names(leaf: Any, device: str) -> bool:
    return (isinstance(leaf, torch.device) and leaf.type == device) or (isinstance(leaf, str) and leaf == device)


def _without_values(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
