"""The adapter in kohya's format, as ComfyUI, AUTOMATIC1111, SD.Next and InvokeAI read it."""

from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

from rlr_peft.durable_files import replacing_file
from rlr_peft.lora.attach import adapted_denoisers
from rlr_peft.lora.export import folded_adapter, sort_header

KOHYA_NAME = "kohya/lora_kohya.safetensors"
"""In a subfolder: `load_lora_weights` would take a second file beside the adapter for it."""


def check_kohya(pipeline: Any, adapter_name: str = "default") -> None:
    """Raises:
    ValueError: the format is not defined for this denoiser or adapter, or diffusers cannot convert it.
    """
    for name in adapted_denoisers(pipeline, adapter_name):
        denoiser = getattr(pipeline, name)
        if type(denoiser) is not UNet2DConditionModel or name != "unet":
            raise ValueError(
                f"output_kohya_format: expected a pipeline with a UNet2DConditionModel, such as Stable Diffusion and "
                f"SDXL, got {type(denoiser).__name__}, for which diffusers has no conversion; drop the option."
            )
        if denoiser.peft_config[adapter_name].use_dora:
            raise ValueError(
                "output_kohya_format: expected plain LoRA, got use_dora, which diffusers cannot convert; drop one."
            )


def save_kohya(pipeline: Any, directory: str | Path, adapter_name: str = "default") -> Path:
    """Writes `kohya/lora_kohya.safetensors` into the folder: float32, the scale folded into the weights.

    Args:
        pipeline: with the trained UNet inside.
        directory: the folder of the adapter.
        adapter_name: peft's name of the adapter inside the UNet.

    Returns:
        The path of the file.

    Raises:
        ValueError: of `check_kohya`.
    """
    check_kohya(pipeline, adapter_name)
    # The conversion says alpha = rank, whatever the adapter's alpha: the scale must be in the weights.
    tensors, _ = folded_adapter(pipeline.unet, adapter_name)
    converted = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in tensors.items()})
    path = Path(directory) / KOHYA_NAME
    with replacing_file(path) as aside:
        save_file({key: value.contiguous() for key, value in converted.items()}, aside, metadata={"format": "pt"})
        sort_header(aside)
    return path
