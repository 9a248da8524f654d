"""Saves the adapter as the one file that `pipeline.load_lora_weights` reads exactly, and proves that it does.

It is saved in kohya's format too, which ComfyUI, AUTOMATIC1111, SD.Next and InvokeAI read. The proof: loaded as users
load it, the saved adapter makes the images that the trained one makes.
"""

import copy
import inspect
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlr_peft.chain.families import adapter_folder, adapter_loading, adapter_prefix
from rlr_peft.durable_files import SECOND_EXPERT, WEIGHT_NAME, replacing_file
from rlr_peft.lora.attach import adapted_denoisers, denoiser_name, lora_parameters
from rlr_peft.lora.files import AdapterMismatchError
from rlr_peft.lora.loading import diffusers_loads, load_lora

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
# Images that the trained and the reloaded adapter draw to be compared bit for bit at the end of a run.
VERIFIED_IMAGES = 2


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


def check_adapter_saves(pipeline: Any) -> None:
    """Saves the adapter and loads it again, which costs no second pipeline: what cannot be saved shows before training.

    It is loaded, as users load it, into denoisers without weights on the meta device, which keep names and shapes; the
    numbers are compared with those of the files.

    Args:
        pipeline: with the adapter inside; left as it is.

    Raises:
        ValueError: the pipeline cannot save an adapter of this part.
        AdapterMismatchError: what comes back is not what was saved.
    """
    names = adapted_denoisers(pipeline)
    trained = nn.ModuleDict({name: getattr(pipeline, name) for name in names})
    # Nothing but the denoisers: loading takes the hooks off offloaded models, and these are the pipeline's own.
    shell = copy.copy(pipeline)
    shell.__dict__.update({name: None for name, part in pipeline.components.items() if isinstance(part, nn.Module)})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of parameters without weights
        save_lora(pipeline, folder)
        # The other expert too: diffusers looks at its config, whichever of the two an adapter is for.
        for name in {*names, SECOND_EXPERT, "transformer"}:
            module = getattr(pipeline, name, None)
            if module is not None:
                with torch.device("meta"):
                    shell.__dict__[name] = type(module).from_config(module.config)
        with without_text_encoder_notice():
            _load_as_users_do(shell, Path(folder), names)
        fresh = nn.ModuleDict({name: getattr(shell, name) for name in names})
        expected, loaded = _same_layers(trained, fresh, folder, "default")
        saved = _saved(folder, names)
    differing = [
        key
        for key, value in expected.items()
        if value.shape != loaded[key].shape or not torch.equal(value.detach().cpu(), saved[key])
    ]
    if differing:
        raise AdapterMismatchError(
            f"The untrained adapter does not come back from its file: {len(differing)} of {len(expected)} LoRA tensors "
            f"differ, the first is {differing[0]}. Choose other --lora_layers."
        )


def verify_lora_reloads(
    trained_pipeline: Any,
    fresh_pipeline: Any,
    directory: str | Path,
    render: Callable[[Any], Tensor],
    *,
    adapter_name: str = "default",
) -> None:
    """Loads the saved adapter into a fresh pipeline and compares the two pipelines' images bit for bit.

    Args:
        trained_pipeline: as trained; rendered in eval mode, left in the mode it was in.
        fresh_pipeline: the same base in the same dtype, on the same device, without any adapter; it gets the adapter.
            diffusers casts a loaded adapter to the base's dtype, so on a half-precision base the trained weights are
            rounded likewise for the comparison, and put back.
        directory: what `save_lora` wrote into, without `fold_alpha` (folding changes the rounding).
        render: makes images from a pipeline, the same for the same weights: fixed seeds, eta = 0 or a fixed generator.
        adapter_name: peft's name of the trained adapter inside the denoiser.

    Raises:
        AdapterMismatchError: nothing was loaded, other layers were loaded than trained, or an image differs.
    """
    names = adapted_denoisers(trained_pipeline, adapter_name)
    trained = nn.ModuleDict({part: getattr(trained_pipeline, part) for part in names})
    fresh = nn.ModuleDict({part: getattr(fresh_pipeline, part) for part in names})
    if any(isinstance(module, LoraLayer) for module in fresh.modules()):
        raise ValueError("verify_lora_reloads expects a fresh pipeline without adapters, got one that has some.")
    with without_text_encoder_notice():
        _load_as_users_do(fresh_pipeline, Path(directory), names)
    expected, loaded = _same_layers(trained, fresh, directory, adapter_name)
    scales, loaded_scales = _scales(trained, adapter_name), _scales(fresh)
    wrong = [name for name, scale in scales.items() if loaded_scales.get(name) != scale]
    if wrong:
        raise AdapterMismatchError(
            f"The reloaded adapter has another scale than the trained one in {len(wrong)} of {len(scales)} layers: in "
            f"{wrong[0]} expected {scales[wrong[0]]:g}, got {loaded_scales.get(wrong[0])}. The scales are in the "
            "file's metadata: save the adapter again with save_lora."
        )
    with _eval_mode(trained), _rounded(expected, loaded), torch.no_grad():
        differing = [key for key in expected if not torch.equal(expected[key].to(loaded[key].device), loaded[key])]
        images, reloaded = render(trained_pipeline), render(fresh_pipeline)
    if images.shape == reloaded.shape and torch.equal(images, reloaded):
        return
    if images.shape != reloaded.shape:
        difference = f"their shapes are {tuple(images.shape)} and {tuple(reloaded.shape)}"
    elif not images.isfinite().all():
        difference = "the trained pipeline's images are not finite"
    else:
        difference = f"the largest difference is {(images.double() - reloaded.double()).abs().max().item():.3g}"
    cause = (
        f"{len(differing)} of {len(expected)} LoRA tensors differ, the first is {differing[0]}: the file was changed "
        "or belongs to another step, so save the adapter again"
        if differing
        else "all LoRA tensors and scales are equal, so the base weights, the scheduler or the rendering differ: check "
        "that both pipelines were loaded alike and render() fixes its seeds"
    )
    raise AdapterMismatchError(
        f"The reloaded adapter does not make the trained adapter's images: {difference}. {cause[0].upper()}{cause[1:]}."
    )


def _load_as_users_do(pipeline: Any, directory: Path, denoisers: list[str]) -> None:
    """By the line that the card shows."""
    if all(diffusers_loads(pipeline, getattr(pipeline, name)) for name in denoisers):
        if denoisers != [SECOND_EXPERT]:
            pipeline.load_lora_weights(str(directory))
        if SECOND_EXPERT in denoisers:
            pipeline.load_lora_weights(str(directory / SECOND_EXPERT), **adapter_loading(SECOND_EXPERT))
    else:
        load_lora(pipeline, directory)


def _scales(denoisers: nn.ModuleDict, adapter_name: str | None = None) -> dict[str, float]:
    """What each layer's product is multiplied by; None takes the one adapter that there is."""
    return {
        name: module.scaling[adapter_name or module.active_adapters[0]]
        for name, module in denoisers.named_modules()
        if isinstance(module, LoraLayer) and (adapter_name or module.active_adapters[0]) in module.scaling
    }


def _same_layers(
    trained: nn.ModuleDict, fresh: nn.ModuleDict, directory: str | Path, adapter_name: str
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained adapter's parameters and those that were loaded, by the same names.

    Raises:
        AdapterMismatchError: nothing was loaded, or other layers than were trained.
    """
    expected = _named_without_adapter(trained, adapter_name)
    loaded: dict[str, nn.Parameter] = {}
    for part, module in fresh.items():
        for active in getattr(module, "peft_config", {}):
            named = _named_without_adapter(module, active)
            loaded |= {f"{part}.{key}": parameter for key, parameter in named.items()}
    if not loaded:
        raise AdapterMismatchError(
            f"load_lora_weights({str(directory)!r}) loaded nothing, without an error: expected {len(expected)} LoRA "
            f"tensors for the {' and the '.join(trained)}. The folder must hold {WEIGHT_NAME} as save_lora writes it "
            "(a folder of peft's save_pretrained has other names and is ignored). Save the adapter again with "
            "save_lora."
        )
    if loaded.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
        raise AdapterMismatchError(
            f"{directory} holds another set of layers than was trained: expected {len(expected)} LoRA tensors, got "
            f"{len(loaded)}; missing {missing[:3]}, unexpected {extra[:3]}. Save the adapter again with save_lora."
        )
    return expected, loaded


def _saved(directory: str | Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the files that `save_lora` wrote, named as those of a `ModuleDict` of the denoisers."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        folder, prefix = Path(directory) / adapter_folder(name), adapter_prefix(name)
        found = load_file(folder / WEIGHT_NAME)
        # The file names a DoRA's magnitudes without the `weight` that peft's layers call them by.
        tensors |= {
            f"{name}.{key.removeprefix(f'{prefix}.')}{'.weight' if key.endswith('_vector') else ''}": tensor
            for key, tensor in found.items()
        }
    return tensors


def _named_without_adapter(denoiser: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    adapter = re.compile(rf"(?<=\.)(lora_\w+)\.{re.escape(adapter_name)}(?=\.|$)")
    return {adapter.sub(r"\1", name): value for name, value in lora_parameters(denoiser, adapter_name).items()}


@contextmanager
def _rounded(expected: dict[str, nn.Parameter], loaded: dict[str, nn.Parameter]) -> Iterator[None]:
    """Casts the trained weights to the dtypes that the reader gave its own; puts them back afterwards."""
    full = {key: parameter.data for key, parameter in expected.items()}
    try:
        for key, parameter in expected.items():
            parameter.data = full[key].to(loaded[key].dtype)
        yield
    finally:
        for key, parameter in expected.items():
            parameter.data = full[key]


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    was_training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in was_training:
            child.training = True


@contextmanager
def without_text_encoder_notice() -> Iterator[None]:
    """Drops diffusers' long notice that an adapter of the denoiser has no part for the text encoder."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    logger = logging.getLogger("diffusers.loaders.lora_base")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
