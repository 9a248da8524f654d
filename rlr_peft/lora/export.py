"""Saves the adapter as the one file that `pipeline.load_lora_weights` reads exactly, and for other programs."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from rlr_peft.chain.families import adapter_folder, adapter_prefix
from rlr_peft.durable_files import WEIGHT_NAME, replacing_file
from rlr_peft.lora.attach import ADAPTER, adapted_denoisers
from rlr_peft.lora.files import AdapterFiles, AdapterFormatError, read_tensors
from rlr_peft.lora.formats import apply_settings, format_name, layers_of

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
# Layers of images' UNets, and of the transformers with joint attention, whose blocks have one `attn`.
_OF_UNET = re.compile(r"unet\.(?!.*(?:motion_modules|temp_|transformer_in))")
_OF_TRANSFORMER = re.compile(r"transformer\.(?!.*\.(?:attn[12]|attention)\.)(?!blocks\.|layers\.)")


def save_lora(pipeline: Any, directory: str | Path) -> Path:
    """Writes `pytorch_lora_weights.safetensors`: native PEFT keys, float32, and the metadata to scale them by.

    The adapter of a second denoiser, `transformer_2`, goes into a file of the same name in the subfolder
    `transformer_2`, which `load_lora_weights(..., load_into_transformer_2=True)` reads.

    Args:
        pipeline: with the trained denoiser inside.
        directory: created when missing. An adapter file that is already there is replaced at once, or kept on an error.

    Returns:
        The path of the file, of two the first.
    """
    paths = [
        _save_denoiser(pipeline, name, Path(directory) / adapter_folder(name)) for name in adapted_denoisers(pipeline)
    ]
    if not paths:
        raise ValueError(f"Expected a trained adapter in the {type(pipeline).__name__}: attach one first.")
    return paths[0]


def _save_denoiser(pipeline: Any, name: str, directory: Path) -> Path:
    denoiser = getattr(pipeline, name)
    prefix = adapter_prefix(name)
    has_own = name in getattr(pipeline, "_lora_loadable_modules", ())  # PRX's are of a UNet, and PixArt has none
    save = pipeline.save_lora_weights if has_own else None
    if save is not None and f"{prefix}_lora_adapter_metadata" not in inspect.signature(save).parameters:
        raise ValueError(
            f"{type(pipeline).__name__} cannot save a LoRA of its {name} with metadata: expected a pipeline "
            f"whose save_lora_weights takes {prefix}_lora_adapter_metadata. Use diffusers >= 0.35 and such a pipeline."
        )
    tensors, metadata = _adapter(denoiser)
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


def _adapter(denoiser: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter's tensors by native PEFT keys, and its metadata."""
    # native keys: convert_state_dict_to_diffusers silently loses convolutions and projections
    tensors = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    tensors = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
    config = denoiser.peft_config[ADAPTER].to_dict()
    metadata = {key: config[key] for key in METADATA_KEYS}
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set: its order changes from run to run
    return tensors, metadata


def _write(path: Path, prefix: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """The same file for a pipeline without a `save_lora_weights` of this denoiser."""
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
        if denoiser.peft_config[ADAPTER].use_dora:
            raise ValueError(
                "output_kohya_format: expected plain LoRA, got use_dora, which diffusers cannot convert; drop one."
            )


def export_adapter(files: AdapterFiles, path: Path) -> None:
    """Writes an adapter as one file for programs that read no metadata: float32, the scale folded into the weights.

    The names are those that ComfyUI's `comfy/lora.py` lists for the family: kohya's of a UNet, by diffusers' own
    conversion, and diffusers' of FLUX, SD3 and Qwen-Image. Every program takes a file without alpha, or with alpha =
    rank, at scale 1.

    Args:
        files: an adapter in diffusers' format, such as a run's.
        path: of the file; one that is there is replaced at once, or kept on an error.

    Raises:
        AdapterFormatError: of another format or family, or DoRA or biases, which have no place there.
    """
    tensors: dict[str, torch.Tensor] = {}
    for source in files.paths:
        read, settings = read_tensors(source, files.place)
        layers = {layer.name: layer for layer in layers_of(read, files.place)}
        if not (all(map(_OF_UNET.match, layers)) or all(map(_OF_TRANSFORMER.match, layers))):
            raise AdapterFormatError(
                f"The adapter {files.place}: expected diffusers' format and layers of Stable Diffusion, SDXL, SD3, "
                f"FLUX or Qwen-Image alone, got {format_name(read)} with {next(iter(layers))}; use `rlr-peft merge`."
            )
        apply_settings(layers, settings, files.place, of_base=layers, prefixed=True)
        for name, layer in layers.items():
            if layer.magnitude is not None or layer.bias is not None:
                raise AdapterFormatError(
                    f"The adapter {files.place}: expected plain LoRA, got DoRA or biases, which cannot be exported; "
                    "use `rlr-peft merge`."
                )
            tensors[f"{name}.lora_A.weight"] = layer.down.float()
            tensors[f"{name}.lora_B.weight"] = layer.up.float() * layer.scale
    if next(iter(tensors)).startswith("unet."):
        tensors = convert_state_dict_to_kohya(tensors)  # with alpha = rank
    with replacing_file(path) as aside:
        save_file({key: value.contiguous() for key, value in tensors.items()}, aside, metadata={"format": "pt"})
        sort_header(aside)
