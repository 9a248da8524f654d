"""An adapter's files: found in a folder, a file or a repository of the Hub, and read before any model is loaded.

Reading runs nothing that is in a file. What people take for LoRA adapters and is something else is named.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlr_peft.errors import UserError, did_you_mean
from rlr_peft.files import ADAPTER_FILES, WEIGHT_NAME, PlainFileError, parse_json, stays_inside
from rlr_peft.foreign_text import printable


class AdapterFormatError(UserError, ValueError):
    """A file that is no adapter, is damaged, contradicts itself, or is of a kind that cannot be loaded."""


class AdapterMismatchError(UserError, RuntimeError):
    """The adapter is of another base, or what was loaded is not what its file says."""


PEFT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_SETTINGS = "adapter_config.json"

_IN_WORDS = {
    GatedRepoError: "is gated: accept its terms on the Hub and log in with `hf auth login`",
    RevisionNotFoundError: "has no such revision",
    RepositoryNotFoundError: (
        "was not found, or is private: check the name, and log in with `hf auth login` or give --hub_token"
    ),
    LocalEntryNotFoundError: "is not in the local cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set",
}


class AdapterNotFoundError(UserError, OSError):
    """There is no adapter where one was said to be."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on this machine.

    Attributes:
        place: what the user called it.
        folder: holds its file.
        weight_name: name of the file in it; with our own name the folder may hold `transformer_2/` too.
    """

    place: str
    folder: Path
    weight_name: str = WEIGHT_NAME

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        names = ADAPTER_FILES if self.weight_name == WEIGHT_NAME else (self.weight_name,)
        return [path for path in (self.folder / name for name in names) if path.exists()]

    def settings(self) -> dict[str, Any]:
        """What peft's `save_pretrained` writes beside its file; empty for other files.

        Raises:
            AdapterFormatError: it is damaged.
        """
        path = self._settings_path
        if path is None:
            return {}
        return parsed_settings(path.read_text(errors="replace"), f"The adapter {self.place}: its {PEFT_SETTINGS}")

    @property
    def _settings_path(self) -> Path | None:
        path = self.folder / PEFT_SETTINGS
        return path if self.weight_name in PEFT_NAMES and path.exists() else None

    def fingerprint(self) -> str:
        """SHA-256 of its files: equal for equal adapters wherever they lie."""
        total = hashlib.sha256()
        for path in (*self.paths, *filter(None, [self._settings_path])):
            with path.open("rb") as file:
                total.update(path.parent.name.encode() if path.parent != self.folder else b"")
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def find_adapter(place: str, *, token: str | None = None, cache_dir: str | None = None) -> AdapterFiles:
    """Finds an adapter, and downloads it if it lies on the Hub.

    Args:
        place: a folder, a file, or a repository `user/name`, also `user/name@revision`. A folder or repository holds
            `pytorch_lora_weights.safetensors`, or a single `.safetensors` file, or a single pickle (`.bin`, `.pt`).
        token: for the Hub; None takes the one that the machine is logged in with.
        cache_dir: folder of the Hub's cache; None for the default one.

    Raises:
        AdapterNotFoundError: nothing there, nothing that is an adapter, or no access.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return AdapterFiles(place, path.parent, path.name)
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        names += [name for name in ADAPTER_FILES[1:] if (path / name).is_file()]
        return AdapterFiles(place, path, _weight_name(place, names))
    if place.startswith(("/", ".", "~")) or place.partition("@")[0].count("/") != 1:
        raise AdapterNotFoundError(
            f"adapter {place}: expected a folder, a .safetensors file or a Hub repository `user/name`, got a path "
            f"that does not exist (looked for it from {Path.cwd()}).{did_you_mean(place)}"
        )
    return _download(place, token, cache_dir)


def _download(place: str, token: str | None, cache_dir: str | None) -> AdapterFiles:
    repo, at, revision = place.partition("@")
    if at and not stays_inside(revision):  # it becomes a path in the Hub's cache
        raise AdapterNotFoundError(f"adapter {place}: expected user/name@REVISION, got {revision!r}; correct it.")

    def get(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=revision or None, token=token, cache_dir=cache_dir))

    try:
        try:
            file = get(WEIGHT_NAME)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            names = HfApi(token=token).list_repo_files(repo, revision=revision or None)
            # The Hub's client shows the name while it downloads, as it is.
            file = get(_weight_name(place, sorted(name for name in names if name == printable(name))))
            if file.name in PEFT_NAMES and PEFT_SETTINGS in names:
                get(PEFT_SETTINGS)
        if file.name == WEIGHT_NAME:
            _get_second_expert(get)
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        words = next((text for kind, text in _IN_WORDS.items() if isinstance(error, kind)), f"cannot be read: {error}")
        raise AdapterNotFoundError(
            f"adapter {place}: there is no such folder or file here, and the Hub repository {repo} {words}."
            f"{did_you_mean(place)}"
        ) from error
    return AdapterFiles(place, file.parent, file.name)


def _get_second_expert(get: Callable[[str], Path]) -> None:
    """`transformer_2/`, which most repositories do not have."""
    try:
        get(ADAPTER_FILES[1])
    except EntryNotFoundError as error:
        # Where it could not be asked for, half an adapter must not pass for the whole.
        if isinstance(error, LocalEntryNotFoundError) and not is_offline_mode():
            raise


def _weight_name(place: str, names: list[str]) -> str:
    """Which of the files, named from the folder on, is the adapter."""
    if any(name in names for name in ADAPTER_FILES):
        return WEIGHT_NAME
    if "model_index.json" in names:
        raise AdapterNotFoundError(
            f"adapter {place}: expected an adapter, got a whole pipeline (it has a model_index.json); give it as the "
            "base."
        )
    top = [name for name in names if "/" not in name]
    found = [name for name in top if name.endswith(".safetensors")] or [
        name for name in top if name.endswith(PICKLE_ENDINGS)
    ]
    if len(found) == 1:
        return found[0]
    got = f"{len(found)} of them ({', '.join(found[:5])}): name the file" if found else "none"
    raise AdapterNotFoundError(f"adapter {place}: expected {WEIGHT_NAME} or one .safetensors file, got {got}.")


PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # float32 holds all their numbers
_METADATA = "lora_adapter_metadata"


def read_tensors(path: Path, place: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads an adapter file, `.safetensors` or a pickle of tensors alone.

    Args:
        path: the file; what it is shows in its first bytes, whatever its name.
        place: what the user called it, for messages.

    Returns:
        Its tensors on the CPU, floating point, finite and not empty (fp8 as float32, which holds all its numbers), and
        the adapter's settings that diffusers writes beside them; empty where there are none.

    Raises:
        AdapterFormatError: anything else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise AdapterFormatError(
                f"{_got(place)} a Git LFS pointer, which stands for the file; get the file itself with `git lfs pull`."
            )
        # Byte 8 begins the header of safetensors; its length before it can be any bytes, a pickle's first ones too.
        if start[8:9] != b"{" and start.startswith(_PICKLE_STARTS):
            tensors, settings = _read_pickle(path, place), dict[str, Any]()
        else:
            tensors, settings = _read_safetensors(path, place)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(
            f"{_got(place)} a file that cannot be read as safetensors ({str(error).splitlines()[0][:200]}): it is "
            "damaged or not whole; get it again."
        ) from None
    return {name: _looked_at(name, tensor, place) for name, tensor in tensors.items()}, settings


def _read_safetensors(path: Path, place: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        _refuse_other_kinds(names, place)  # before gigabytes of a checkpoint are read
        text = (file.metadata() or {}).get(_METADATA, "{}")
        tensors = {name: file.get_tensor(name) for name in names}
    return tensors, parsed_settings(text, f"{place}: its metadata `{_METADATA}`")


def parsed_settings(text: str, what: str) -> dict[str, Any]:
    """The settings of an adapter from their JSON.

    Raises:
        AdapterFormatError: it is no JSON object.
    """
    try:
        settings = parse_json(text)
    except PlainFileError:
        settings = None
    if not isinstance(settings, dict):
        raise AdapterFormatError(f"{what}: expected a JSON object, got {text[:60]!r}; save the adapter again.")
    return settings


def _read_pickle(path: Path, place: str) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle's version: the error says what matters
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        words = str(error)
        if "GLOBAL" in words or "Unsupported" in words:
            raise AdapterFormatError(
                f"{_got(place)} a pickle that would run code when it is read, which is refused; convert it to "
                "safetensors with the program that made it."
            ) from None
        raise AdapterFormatError(f"{_got(place)} a damaged pickle; get it again.") from None
    except Exception as error:  # whatever damaged bytes make of it: torch checks them with assertions and structs too
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise AdapterFormatError(f"{_got(place)} a pickle that cannot be read ({reason}); get it again.") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise AdapterFormatError(f"{_got(place)} a pickled {type(content).__name__}; take a file of named tensors.")
    _refuse_other_kinds(list(content), place)
    strange = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        raise AdapterFormatError(f"{_got(place)} {strange!r}, a {type(content[strange]).__name__}; take another file.")
    return content


def _refuse_other_kinds(names: list[str], place: str) -> None:
    kind = other_kind(names)
    if kind is not None:
        raise AdapterFormatError(f"{_got(place)} {kind}.")


def _looked_at(name: str, tensor: Tensor, place: str) -> Tensor:
    if tensor.numel() == 0:
        raise AdapterFormatError(
            f"{_got(place)} {name} of shape {tuple(tensor.shape)}, without a number; get it again."
        )
    if tensor.dtype in _FP8:
        tensor = tensor.float()
    if tensor.layout is not torch.strided or (tensor.dtype not in _DTYPES and not name.endswith(".alpha")):
        kind = tensor.layout if tensor.layout is not torch.strided else tensor.dtype
        raise AdapterFormatError(
            f"{_got(place)} {name} in {str(kind).removeprefix('torch.')}; take the adapter in fp32, fp16 or bf16."
        )
    if not tensor.isfinite().all():
        raise AdapterFormatError(f"{_got(place)} {name} with NaN or infinity in it: it is damaged; get it again.")
    return tensor.detach()


def _got(place: str) -> str:
    return f"The adapter {place}: expected LoRA weights, got"


_LORA = re.compile(r"[._]lora(?:[._]|\d)|\.hada_|\.lokr_")

# What the names of adapters of other kinds hold, whatever else is in the file.
_OTHER_ADAPTERS = (
    (r"lora_controlnet", "a Control-LoRA, a ControlNet in small", "load it with diffusers' ControlNetModel"),
    (r"\.ia3_|\.on_input$", "an IA3 adapter", "peft alone can apply it; train or take a LoRA"),
    (r"\.b?oft_|\.oft_blocks|\.oft_diag", "an OFT adapter", "peft alone can apply it; train or take a LoRA"),
    (r"\.vera_lambda", "a VeRA adapter", "peft alone can apply it; train or take a LoRA"),
    (r"\.fourierft_", "a FourierFT adapter", "peft alone can apply it; train or take a LoRA"),
    (r"\.lora_embedding_", "a LoRA of an embedding table", "diffusers cannot load it; take one without"),
    (r"\.diff(?:_b|_m)?$|\.[wb]_norm$", "an adapter with whole differences of weights (`diff`, `w_norm`)", "these "
     "are no LoRA; ask its author for one, or merge it with the program that made it"),
    (r"^image_proj\.|^ip_adapter\.|^image_proj_model\.", "an IP-Adapter", "load it with pipe.load_ip_adapter"),
    (r"string_to_param|^emb_params$|^clip_[lg]$|^t5xxl$|^<[^.]+>$", "a textual inversion, new words for the text "
     "encoder", "load it with pipe.load_textual_inversion"),
)  # fmt: skip

# Whole models; asked only where no name is of a LoRA. The first that fits is taken.
_MODELS = (
    (r"^control_model\.|controlnet_cond_embedding|^zero_convs|input_hint_block|controlnet_down_blocks|controlnet_blocks",
     "a ControlNet", "load it with diffusers' ControlNetModel"),
    (r"^model\.diffusion_model\.|^first_stage_model\.|^cond_stage_model\.|^conditioner\.", "a whole checkpoint in one "
     "file, a base and no adapter", "give it as the base, or take an adapter"),
    (r"motion_modules\.|temporal_transformer", "a motion module", "give it as pretrained_motion_adapter_name_or_path"),
    (r"^adapter\.body\.|^body\.\d+\.", "a T2I-Adapter", "load it with diffusers' T2IAdapter"),
    (r"^encoder\.(?:conv_in|down)|^decoder\.(?:conv_in|up|mid)|^(?:post_)?quant_conv\.|^vae\.", "a VAE", "give it as "
     "pretrained_vae_model_name_or_path"),
    (r"^(?:unet\.|transformer\.|diffusion_model\.)?(?:down_blocks|up_blocks|mid_block|conv_in|time_embedding|input_blocks|"
     r"output_blocks|middle_block|transformer_blocks|single_transformer_blocks|double_blocks|single_blocks|joint_blocks|"
     r"blocks|layers|x_embedder|patch_embed\w*)\.", "the weights of a whole denoiser", "give its pipeline as the base, "
     "and an adapter as the adapter"),
    (r"^(?:text_encoder\.)?(?:text_model|encoder\.block|encoder\.layers|shared|embeddings|model\.layers)\b", "the "
     "weights of a text encoder", "take an adapter"),
    (r"^(?:state|param_groups|optimizer\w*|lr_scheduler\w*|epoch|global_step|step)$", "a training state", "take the "
     "adapter that was saved beside it"),
)  # fmt: skip


def other_kind(names: Collection[str]) -> str | None:
    """What a file with these tensor names is and what to do with it, if it is no adapter that can be loaded.

    Returns:
        Half a sentence for "expected LoRA weights, got ...", or None for a LoRA, LoHa or LoKr.
    """
    has_lora = any(_LORA.search(name) for name in names)
    for pattern, kind, advice in (*_OTHER_ADAPTERS, *(() if has_lora else _MODELS)):
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            return f"{kind} (it holds {found[:100]}): {advice}"
    if not names:
        return "a file without tensors; get it again"
    if not has_lora:
        first = ", ".join(sorted(names)[:2])[:200]
        return f"a file without a tensor that is named as LoRA weights are ({first}, ...); take another file"
    return None
