"""The adapter of a run: its weights on a frozen denoiser, switched off for the reference model, and saved.

It is saved as the one file that `pipeline.load_lora_weights` reads exactly, and for other programs.
"""

import inspect
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from rlr_peft.chain.families import adapter_folder, adapter_prefix, models_of
from rlr_peft.files import WEIGHT_NAME, replacing_file
from rlr_peft.lora.files import AdapterFiles, AdapterFormatError, read_tensors
from rlr_peft.lora.formats import apply_settings, format_name, layers_of

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADAPTER = "default"
"""What peft calls the adapter that is trained; it is not written to the file."""


def adapted_denoisers(pipeline: Any) -> list[str]:
    """The attributes of the pipeline whose module holds the trained adapter, in the pipeline's order."""
    return [name for name, part in models_of(pipeline).items() if ADAPTER in getattr(part, "peft_config", {})]


def attach_lora(
    denoiser: nn.Module,
    *,
    target_modules: Sequence[str],
    rank: int = 4,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
    init_lora_weights: str = "gaussian",
    seed: int = 0,
) -> list[nn.Parameter]:
    """Adds a trainable LoRA to the denoiser, in float32 whatever the base's dtype, and freezes everything else.

    Args:
        denoiser: UNet or transformer, changed in place; its output stays the same until the first update.
        target_modules: names, or ends of names after a dot, of the linear and convolution layers to adapt.
        rank: of each pair of matrices; at least 1, and even for `orthogonal`.
        lora_alpha: the product is scaled by `lora_alpha / rank` (by `lora_alpha / sqrt(rank)` with `use_rslora`);
            None means `rank`.
        lora_dropout: probability in [0, 1) of dropping an input of the LoRA in train mode.
        use_dora: also train the norm of each output's weights (DoRA).
        use_rslora: scale by the square root of the rank (rank-stabilised LoRA).
        init_lora_weights: `gaussian` (std 1 / rank), `kaiming` (uniform) or `orthogonal`.
        seed: the same seed gives the same weights whatever was drawn before; the global random state is left as it was.

    Returns:
        The trainable parameters, in the order of `lora_parameters`.

    Raises:
        ValueError: a target that matches no adaptable layer, or an odd rank for `orthogonal`.
    """
    if init_lora_weights == "orthogonal" and rank % 2:
        raise ValueError(f"rank must be even for orthogonal initialisation; got {rank}.")
    _check_targets(denoiser, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=list(target_modules),
        use_dora=use_dora,
        use_rslora=use_rslora,
        init_lora_weights="gaussian" if init_lora_weights == "gaussian" else True,
    )
    denoiser.requires_grad_(False)
    # peft draws on the default device and then moves the weights: on the CPU the numbers are the same on every machine
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(config, ADAPTER)  # type: ignore[operator]
        else:  # UNet3DConditionModel and PixArt have none
            inject_adapter_in_model(config, denoiser, ADAPTER)
        parameters = lora_parameters(denoiser)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if init_lora_weights == "orthogonal":
            _initialise_orthogonally(denoiser)
    return list(parameters.values())


def lora_size(denoiser: nn.Module, target_modules: Sequence[str], rank: int) -> int:
    """Number of weights that `attach_lora` would add for these targets (DoRA's norms, which are few, left out)."""
    size = 0
    for name, module in denoiser.named_modules():
        if isinstance(module, ADAPTABLE) and any(f".{name}".endswith(f".{target}") for target in target_modules):
            # A linear layer says its sizes itself: in 4 bits its weight is one packed column.
            shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else module.weight.shape
            size += rank * (math.prod(shape[1:]) + shape[0])
    return size


def lora_parameters(denoiser: nn.Module, adapter_name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the denoiser, in the denoiser's order: the same in every process."""
    of_adapter = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")
    return {name: parameter for name, parameter in denoiser.named_parameters() if of_adapter.search(name)}


@contextmanager
def adapter_disabled(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the denoiser computes what its base model computes: the reference model, without a second copy of it."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, LoraLayer) and not layer.disable_adapters]
    requires_grad = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}

    def enable(enabled: bool) -> None:
        for layer in layers:
            layer.enable_adapters(enabled)
        # peft switches requires_grad along with the adapter, and a tape loses, silently, the gradients of parameters
        # that are switched off while it runs backward
        for parameter, value in requires_grad.items():
            parameter.requires_grad_(value)

    enable(False)
    try:
        yield
    finally:
        enable(True)


def _check_targets(denoiser: nn.Module, target_modules: Sequence[str]) -> None:
    adaptable = [
        name.removesuffix(".base_layer")  # a layer that already has another adapter can take a second one
        for name, module in denoiser.named_modules()
        if isinstance(module, ADAPTABLE) and ".lora_" not in name
    ]
    unmatched = [
        target for target in target_modules if not any(f".{name}".endswith(f".{target}") for name in adaptable)
    ]
    if target_modules and not unmatched:
        return
    endings = set()
    for name in adaptable:
        parts = name.split(".")
        endings.add(".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]))  # `to_out.0`: `0` alone says nothing
    wrong = f"no layer for {', '.join(map(repr, unmatched))}" if unmatched else "no targets at all"
    raise ValueError(
        f"LoRA targets: got {wrong}; expected names, or ends of names, of linear or convolution layers of "
        f"{type(denoiser).__name__}. Choose from: {', '.join(sorted(endings))}."
    )


def _initialise_orthogonally(denoiser: nn.Module) -> None:
    """A non-zero start whose product is zero: A and B use complementary halves of an orthonormal basis of R^rank.

    Drawn here because peft rounds its own to the base's dtype (in bf16 the product is then far from zero) and has none
    for convolutions.
    """
    for layer in denoiser.modules():
        if not isinstance(layer, LoraLayer):
            continue
        lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        rank = lora_a.shape[0]
        basis = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q
        down = basis[:, : rank // 2] @ torch.randn(rank // 2, lora_a[0].numel(), dtype=torch.float64) / 10
        up = torch.randn(lora_b.shape[0], rank // 2, dtype=torch.float64) @ basis[:, rank // 2 :].T / 10
        lora_a.data.copy_(down.reshape(lora_a.shape))
        lora_b.data.copy_(up.reshape(lora_b.shape))


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
