"""LoRA weights of a denoiser: attaching them, saving them so that diffusers loads them, and proving that it does."""

from rlr_peft.durable_files import WEIGHT_NAME
from rlr_peft.lora.attach import (
    adapted_denoisers,
    adapter_disabled,
    attach_lora,
    denoiser_name,
    lora_parameters,
    lora_size,
)
from rlr_peft.lora.export import check_kohya, export_adapter, save_lora
from rlr_peft.lora.files import (
    AdapterFiles,
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    find_adapter,
)
from rlr_peft.lora.loading import (
    adapted_parts,
    adapter_loaded,
    check_adapter,
    diffusers_loads,
    load_fitting_lora,
    load_lora,
    merge_lora,
    start_from,
    unload_lora,
)
from rlr_peft.lora.proof import check_adapter_saves, verify_lora_reloads

__all__ = [
    "WEIGHT_NAME",
    "AdapterFiles",
    "AdapterFormatError",
    "AdapterMismatchError",
    "AdapterNotFoundError",
    "adapted_denoisers",
    "adapted_parts",
    "adapter_disabled",
    "adapter_loaded",
    "attach_lora",
    "check_adapter",
    "check_adapter_saves",
    "check_kohya",
    "denoiser_name",
    "diffusers_loads",
    "export_adapter",
    "find_adapter",
    "load_fitting_lora",
    "load_lora",
    "lora_parameters",
    "lora_size",
    "merge_lora",
    "save_lora",
    "start_from",
    "unload_lora",
    "verify_lora_reloads",
]
