"""Saves the adapter as the one file that `pipeline.load_lora_weights` reads exactly.

It is saved in kohya's format too, which ComfyUI, AUTOMATIC1111, SD.Next and InvokeAI read.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from rlr_peft.chain.families import adapter_folder, adapter_prefix
from rlr_peft.durable_files import WEIGHT_NAME, replacing_file
from rlr_peft.lora.attach import adapted_denoisers, denoiser_name

METADATA_KEYS = (
    "r",
    "lora_alpha",
    "target_modules",
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
)
"""What a reader must know to apply the weights, and no more: a key that its peft lacks is a TypeError there."""
KOHYA_NAME = "kohya/lora_kohya.safetensors"
"""In a subfolder: `load_lora_weights` would take a second file beside the adapter for it."""


def save_lora(pipeline: Any, directory: str | Path, *, fold_alpha: bool = False, adapter_name: str = "default") -> Path:
    """Writes `pytorch_lora_weights.safetensors`: native PEFT keys, float32, and the metadata to scale them by.

    The adapter of a second denoiser, `transformer_2`, goes into a file of the same name in the subfolder
    `transformer_2`, which `load_lora_weights(..., load_into_transformer_2=True)` reads.

    Args:
        pipeline: with the trained denoiser inside.
        directory: created when missing. An adapter file that is already there is replaced at once, or kept on an error.
        fold_alpha: multiply the scale into lora_B and say `lora_alpha = r`, for readers that ignore the metadata
            (diffusers before 0.35, other programs). Equal up to rounding, and exactly when the scale is a power of two.
        adapter_name: peft's name of the adapter inside the denoiser.

    Returns:
        The path of the file, of two the first.
    """
    paths = []
    for name in adapted_denoisers(pipeline, adapter_name):
        folder = Path(directory) / adapter_folder(name)
        paths.append(_save_denoiser(pipeline, name, folder, fold_alpha, adapter_name))
    if not paths:
        raise ValueError(f"Expected an adapter {adapter_name!r} in the {denoiser_name(pipeline)}: attach one first.")
    return paths[0]


def _save_denoiser(pipeline: Any, name: str, directory: Path, fold_alpha: bool, adapter_name: str) -> Path:
    denoiser = getattr(pipeline, name)
    prefix = adapter_prefix(name)
    save = getattr(pipeline, "save_lora_weights", None)
    if save is not None and f"{prefix}_lora_adapter_metadata" not in inspect.signature(save).parameters:
        raise ValueError(
            f"{type(pipeline).__name__} cannot save a LoRA of its {name} with metadata: expected a pipeline "
            f"whose save_lora_weights takes {prefix}_lora_adapter_metadata. Use diffusers >= 0.35 and such a pipeline."
        )
    tensors, metadata = _adapter(denoiser, fold_alpha, adapter_name)
    path = directory / WEIGHT_NAME
    with replacing_file(path) as aside:
        if save is None:
            _write(aside, prefix, tensors, metadata)
        else:
            save(
                save_directory=aside.parent,
                weight_name=aside.name,
                **{f"{prefix}_lora_layers": tensors, f"{prefix}_lora_adapter_metadata": metadata},
            )
        sort_header(aside)
    return path


def _adapter(denoiser: Any, fold_alpha: bool, adapter_name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter's tensors by native PEFT keys, and its metadata."""
    # native keys: convert_state_dict_to_diffusers silently loses convolutions and projections
    tensors = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    tensors = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
    config = denoiser.peft_config[adapter_name].to_dict()
    metadata = {key: config[key] for key in METADATA_KEYS}
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set: its order changes from run to run
    if fold_alpha:
        for module_name, module in denoiser.named_modules():
            if isinstance(module, LoraLayer) and adapter_name in module.scaling:
                for key in (f"{module_name}.lora_B.weight", f"{module_name}.lora_B.bias"):
                    if key in tensors:
                        tensors[key] = tensors[key] * module.scaling[adapter_name]
        metadata |= {"lora_alpha": metadata["r"], "alpha_pattern": dict(metadata["rank_pattern"]), "use_rslora": False}
    return tensors, metadata


def _write(path: Path, prefix: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """The same file for a pipeline without `save_lora_weights`, such as PixArt's."""
    text = json.dumps({f"{prefix}.{key}": value for key, value in metadata.items()}, indent=2, sort_keys=True)
    named = {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}
    save_file(named, path, metadata={"format": "pt", "lora_adapter_metadata": text})


def sort_header(path: Path) -> None:
    """Puts the file's metadata in alphabetical order: safetensors writes them in an order that changes at random.

    So equal adapters are equal files, byte for byte, and pushing one again uploads nothing.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def check_kohya(pipeline: Any) -> None:
    """Raises:
    ValueError: the format is not defined for this denoiser or adapter, or diffusers cannot convert it.
    """
    for name in adapted_denoisers(pipeline):
        denoiser = getattr(pipeline, name)
        if type(denoiser) is not UNet2DConditionModel or name != "unet":
            raise ValueError(
                f"output_kohya_format: expected a pipeline with a UNet2DConditionModel, such as Stable Diffusion and "
                f"SDXL, got {type(denoiser).__name__}, for which diffusers has no conversion; drop the option."
            )
        if denoiser.peft_config["default"].use_dora:
            raise ValueError(
                "output_kohya_format: expected plain LoRA, got use_dora, which diffusers cannot convert; drop one."
            )


def save_kohya(pipeline: Any, directory: str | Path) -> Path:
    """Writes `kohya/lora_kohya.safetensors` into the folder: float32, the scale folded into the weights.

    Args:
        pipeline: with the trained UNet inside.
        directory: the folder of the adapter.

    Returns:
        The path of the file.

    Raises:
        ValueError: of `check_kohya`.
    """
    check_kohya(pipeline)
    # The conversion says alpha = rank, whatever the adapter's alpha: the scale must be in the weights.
    tensors, _ = _adapter(pipeline.unet, True, "default")
    converted = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in tensors.items()})
    path = Path(directory) / KOHYA_NAME
    with replacing_file(path) as aside:
        save_file({key: value.contiguous() for key, value in converted.items()}, aside, metadata={"format": "pt"})
        sort_header(aside)
    return path
