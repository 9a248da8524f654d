"""The tensors of an adapter file: read without running anything that is in it, and looked at before they are used."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlr_peft.lora.errors import AdapterFormatError
from rlr_peft.lora.other_kinds import other_kind

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
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise AdapterFormatError(f"{what}: expected a JSON object, got {text[:60]!r}; save the adapter again.")
    return settings


def _read_pickle(path: Path, place: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        words = str(error)
        if "GLOBAL" in words or "Unsupported" in words:
            raise AdapterFormatError(
                f"{_got(place)} a pickle that would run code when it is read, which is refused; convert it to "
                "safetensors with the program that made it."
            ) from None
        raise AdapterFormatError(f"{_got(place)} a damaged pickle; get it again.") from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
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
