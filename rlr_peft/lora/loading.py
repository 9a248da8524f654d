"""Loads a saved adapter whole, at the scale that its file names, or says why not; takes it out again, or fuses it in.

diffusers loads what it recognises and passes over the rest, often without a word, and takes some scales for others. So
the file is read here, and what arrived in the layers is compared with it.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlr_peft.chain.families import denoiser_of_file, models_of
from rlr_peft.lora.adapter import ADAPTER
from rlr_peft.lora.files import AdapterFiles, AdapterFormatError, AdapterMismatchError, find_adapter, read_tensors
from rlr_peft.lora.formats import AdapterLayer, apply_settings, format_name, layers_of
from rlr_peft.lora.placing import LayerNames, place_layers, quiet_diffusers

logger = logging.getLogger(__name__)


def diffusers_loads(pipeline: Any, denoiser: nn.Module) -> bool:
    """Whether `pipeline.load_lora_weights` reaches this denoiser.

    UNet3DConditionModel and PixArt have no loader, and that of PRX looks for a UNet.
    """
    is_named = any(
        getattr(pipeline, name, None) is denoiser for name in getattr(pipeline, "_lora_loadable_modules", ())
    )
    return is_named and hasattr(denoiser, "load_lora_adapter")


def load_lora(pipeline: Any, place: str | Path) -> int:
    """Puts an adapter into a pipeline of any family: every tensor of its files, at the scale that they name.

    Args:
        pipeline: the base that it was trained on.
        place: a folder or a file, or a repository of the Hub, as `find_adapter` takes them. Kohya's, diffusers' and
            peft's formats are read, LoHa and LoKr too.

    Returns:
        Number of adapted layers.

    Raises:
        AdapterNotFoundError: nothing there.
        AdapterFormatError: a file that is no adapter, or is damaged.
        AdapterMismatchError: it does not fit the base whole.
    """
    return load_fitting_lora(pipeline, find_adapter(str(place)))


def check_adapter(files: AdapterFiles) -> None:
    """Reads the adapter's files and looks at all that shows without a base: before one is downloaded. Logs the format.

    Raises:
        AdapterFormatError: a file that is no adapter, is damaged or contradicts itself.
    """
    files.settings()
    for path in files.paths:
        tensors, _ = read_tensors(path, files.place)
        layers = layers_of(tensors, files.place)
        logger.info("%s is in %s, %d layers.", files.place, format_name(tensors), len(layers))


def load_fitting_lora(pipeline: Any, files: AdapterFiles) -> int:
    """Loads the adapter that `find_adapter` found; the rest as `load_lora`."""
    loaded = fitting_layers(pipeline, files)
    if not any(layer.scale for layer in loaded.values()):
        logger.warning("The adapter %s changes nothing: alpha is 0 in all its layers.", files.place)
    adapter_name = _free_name(pipeline)
    for part in dict.fromkeys(name.split(".")[0] for name in loaded):
        of_part = {
            name.removeprefix(f"{part}."): layer for name, layer in loaded.items() if name.startswith(f"{part}.")
        }
        _inject(pipeline, part, of_part, adapter_name)
    check_arrived(pipeline, loaded, adapter_name, files.place)
    return len(loaded)


def fitting_layers(pipeline: Any, files: AdapterFiles) -> dict[str, AdapterLayer]:
    """An adapter's layers by the names of the base's, such as `unet.mid_block.attentions.0.proj_in`.

    Raises:
        AdapterFormatError, AdapterMismatchError: as `load_lora`.
    """
    loaded: dict[str, AdapterLayer] = {}
    for path in files.paths:
        tensors, settings = read_tensors(path, files.place)
        names = LayerNames(pipeline, denoiser_of_file(path, files.folder, pipeline))
        form = format_name(tensors)
        found = place_layers(pipeline, names, layers_of(tensors, files.place), files.place, form)
        of_folder = files.settings()
        apply_settings(found, of_folder or settings, files.place, of_base=names.layers.keys(), prefixed=not of_folder)
        loaded |= found
        without = sum(layer.alpha is None for layer in found.values())
        # diffusers' format means rank where it names no alpha; elsewhere it may have been lost
        if without and (without < len(found) or form.startswith(("kohya", "peft"))):
            logger.warning(
                "The adapter %s, in %s, names no alpha for %d of its %d layers: it is taken as their rank.",
                *(files.place, form, without, len(found)),
            )
    return loaded


def start_from(pipeline: Any, files: AdapterFiles) -> None:
    """Gives the adapter that is trained the weights of a saved one; layers that only it has keep their own.

    A smaller rank fits into a larger one, and another scale is multiplied into the weights: the pipeline draws what it
    draws with the saved adapter.

    Raises:
        AdapterFormatError: it is damaged or no adapter.
        AdapterMismatchError: it is of another base, or of a kind, rank or layers that the trainable one cannot hold.
    """
    trained = _layers_with(pipeline, ADAPTER)
    layers = fitting_layers(pipeline, files)
    if missing := sorted(layers.keys() - trained.keys()):
        raise AdapterMismatchError(
            f"init_adapter: expected layers that are trained here, got {files.place} with {len(missing)} others, such "
            f"as {missing[0]}; name them in --lora_layers, or train another --denoiser."
        )
    for name, layer in layers.items():
        module = trained[name]
        down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        if layer.magnitude is not None or layer.bias is not None or module.use_dora[ADAPTER]:
            raise AdapterMismatchError(
                f"init_adapter: expected plain LoRA here and there, got DoRA or biases at {name} of {files.place}; "
                "merge it into the base with `rlr-peft merge`, and train on that."
            )
        if layer.rank > down.shape[0]:
            raise AdapterMismatchError(
                f"init_adapter: expected a rank of {down.shape[0]} or less, got {layer.rank} at {name} of "
                f"{files.place}; give --rank {layer.rank}."
            )
        with torch.no_grad():
            down[: layer.rank] = layer.down.to(down)
            up.zero_()
            up[:, : layer.rank] = layer.up.to(up) * (layer.scale / module.scaling[ADAPTER])


def _layers_with(pipeline: Any, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that hold the adapter, by their names such as `unet.mid_block.attentions.0.proj_in`."""
    return {name: layer for name, layer in _lora_layers(pipeline).items() if adapter_name in layer.scaling}


def _lora_layers(pipeline: Any) -> dict[str, LoraLayer]:
    return {
        f"{part}.{name}": module
        for part, model in models_of(pipeline).items()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def check_arrived(pipeline: Any, expected: Mapping[str, AdapterLayer], adapter_name: str, place: str) -> None:
    """Reads the adapter back from the pipeline's layers and compares it with its file.

    Args:
        pipeline: with the adapter inside.
        expected: the file's layers by the names of the base's, such as `unet.mid_block.attentions.0.proj_in`.
        place: what the user called it, for messages.

    Raises:
        AdapterMismatchError: a layer, tensor or scale that is missing, additional or different.
    """
    loaded = _layers_with(pipeline, adapter_name)
    different = sorted(loaded.keys() ^ expected.keys())
    for name in loaded.keys() & expected.keys():
        layer, module = expected[name], loaded[name]
        pairs: list[tuple[Tensor | None, Tensor | None]] = [
            (layer.down, module.lora_A[adapter_name].weight),
            (layer.up, module.lora_B[adapter_name].weight),
            (layer.bias, module.lora_B[adapter_name].bias),
            (
                layer.magnitude,
                module.lora_magnitude_vector[adapter_name].weight if module.use_dora[adapter_name] else None,
            ),
        ]
        scale_is_right = abs(module.scaling[adapter_name] - layer.scale) <= 1e-6 * abs(layer.scale)
        if not scale_is_right or not all(_equal(*pair) for pair in pairs):
            different.append(name)
    if different:
        raise AdapterMismatchError(
            f"The adapter {place} did not arrive as its file says: expected {len(expected)} layers, got {len(loaded)}; "
            f"missing or different are {', '.join(different[:3])}. These versions of peft and diffusers load it "
            "wrongly; use those that rlr-peft was tested with."
        )


def _equal(expected: Tensor | None, loaded: Tensor | None) -> bool:
    if expected is None or loaded is None:
        return expected is loaded
    if loaded.is_meta:
        return expected.shape == loaded.shape
    return torch.equal(expected.to(loaded.dtype).flatten(), loaded.detach().to(expected.device).flatten())


def _free_name(pipeline: Any) -> str:
    taken = {name for part in models_of(pipeline).values() for name in getattr(part, "peft_config", {})}
    return next(name for number in range(len(taken) + 1) if (name := f"default_{number}") not in taken)


def _inject(pipeline: Any, part_name: str, layers: Mapping[str, AdapterLayer], adapter_name: str) -> None:
    part = getattr(pipeline, part_name)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        if layer.bias is not None:
            tensors[f"{name}.lora_B.bias"] = layer.bias
        if layer.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "use_rslora": any(layer.rank_stabilised for layer in layers.values()),
        "lora_bias": any(layer.bias is not None for layer in layers.values()),
    }
    with warnings.catch_warnings(), quiet_diffusers():
        warnings.simplefilter("ignore")  # of names that end alike, and of biases that cannot be merged
        if hasattr(part, "load_lora_adapter"):
            part.load_lora_adapter(
                tensors,
                prefix=None,
                adapter_name=adapter_name,
                metadata=settings,
                _pipeline=pipeline,
                low_cpu_mem_usage=True,
            )
            return
        inject_adapter_in_model(LoraConfig(**settings), part, adapter_name, state_dict=tensors)
        dtype = next(parameter.dtype for parameter in part.parameters() if parameter.is_floating_point())
        set_peft_model_state_dict(part, {key: tensor.to(dtype) for key, tensor in tensors.items()}, adapter_name)
    for name, parameter in part.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)
    if hasattr(part, "_hf_peft_config_loaded"):  # so that the pipeline's own unloading finds it
        part._hf_peft_config_loaded = True
    part.eval()


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """peft's patterns for layers that differ from the usual value: one for each value, for peft tries all of them."""
    return {
        f"^(?:{'|'.join(re.escape(name) for name in values if values[name] == value)})": value
        for value in dict.fromkeys(values.values())
        if value != usual
    }


@contextmanager
def adapter_loaded(pipeline: Any, files: AdapterFiles) -> Iterator[None]:
    """Inside, the pipeline draws with the adapter; afterwards it is the base again, bit for bit.

    Raises:
        AdapterFormatError, AdapterMismatchError: the adapter is of another model, damaged, or no adapter.
    """
    if _adapted_layers(pipeline):
        raise ValueError("adapter_loaded expects a pipeline without adapters, got one that has some.")
    try:
        load_fitting_lora(pipeline, files)
        yield
    finally:
        unload_lora(pipeline)


def unload_lora(pipeline: Any) -> None:
    """Takes every adapter out of the pipeline; its layers are then the base's own again.

    Not through `pipeline.unload_lora_weights`, which fails where diffusers has no loader for the denoiser.
    """
    for part in models_of(pipeline).values():
        if any(isinstance(module, LoraLayer) for module in part.modules()):
            recurse_remove_peft_layers(part)
            for attribute in ("peft_config", "_hf_peft_config_loaded"):
                part.__dict__.pop(attribute, None)


def adapted_parts(pipeline: Any) -> list[str]:
    """The attributes of the pipeline whose module has adapted layers now, text encoders included."""
    return sorted({name.split(".")[0] for name in _adapted_layers(pipeline)})


def _adapted_layers(pipeline: Any) -> list[str]:
    layers = _lora_layers(pipeline).items()
    return [name for name, layer in layers if len(layer.lora_A) or len(layer.lora_embedding_A)]


def merge_lora(pipeline: Any) -> list[str]:
    """Adds every loaded adapter to the base's weights and removes its layers.

    Args:
        pipeline: with one adapter loaded, by diffusers or by `load_lora`; changed in place. Float32 weights lose the
            least.

    Returns:
        The attributes of the pipeline that were changed.

    Raises:
        ValueError: no adapter is loaded, or the sum is not finite.
        AdapterFormatError: the adapter has a bias for a layer of the base that has none.
    """
    changed = []
    for name, part in models_of(pipeline).items():
        layers = {path: layer for path, layer in part.named_modules() if isinstance(layer, LoraLayer)}
        if layers:
            _check_biases(name, layers)
            changed.append(name)
        for layer in layers.values():
            layer.merge(safe_merge=True)
    if not changed:
        raise ValueError("No adapter is loaded: it has no layers for this pipeline, so it belongs to another base.")
    unload_lora(pipeline)
    return changed


def _check_biases(part: str, layers: Mapping[str, Any]) -> None:
    without = [
        name for name, layer in layers.items() if any(layer.lora_bias.values()) and layer.get_base_layer().bias is None
    ]
    if without:
        raise AdapterFormatError(
            f"Expected an adapter that the weights of the base can hold, got one with biases (peft's lora_bias) for "
            f"{len(without)} layers that have none ({part}.{without[0]}, ...): it cannot be merged; use it as "
            "an adapter."
        )
