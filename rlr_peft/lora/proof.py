"""The proof of a saved adapter: loaded as users load it, it makes the images that the trained one makes."""

import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from rlr_peft.chain.families import EXPERTS, adapter_folder, adapter_loading, adapter_prefix, models_of
from rlr_peft.files import WEIGHT_NAME
from rlr_peft.lora.adapter import ADAPTER, adapted_denoisers, lora_parameters, save_lora
from rlr_peft.lora.files import AdapterMismatchError
from rlr_peft.lora.loading import diffusers_loads, load_lora

# Images that the trained and the reloaded adapter draw to be compared at the end of a run.
VERIFIED_IMAGES = 2
# Of images in [0, 1], where weights and scales are equal: two or three of 255 levels, which no eye tells apart.
ROUNDING = 0.01


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
    shell.__dict__.update(dict.fromkeys(models_of(pipeline)))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of parameters without weights
        save_lora(pipeline, folder)
        # The other expert too: diffusers looks at its config, whichever of the two an adapter is for.
        for name in {*names, *EXPERTS}:
            module = getattr(pipeline, name, None)
            if module is not None:
                with torch.device("meta"):
                    shell.__dict__[name] = type(module).from_config(module.config)
        adapters = _load_as_users_do(shell, Path(folder), names)
        fresh = nn.ModuleDict({name: getattr(shell, name) for name in names})
        own = dict.fromkeys(names, ADAPTER)
        expected, loaded = _same_layers((pipeline, trained, own), (shell, fresh, adapters), folder)
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
    pipeline: Any,
    directory: str | Path,
    render: Callable[[Any], Tensor],
) -> float:
    """Loads the saved adapter as users do, and compares weights, scales and images with the trained adapter's.

    It is loaded beside the trained one, whose place it takes for its images: nothing but the adapter is twice in
    memory. diffusers casts a loaded adapter to the base's dtype, so on a half-precision base the trained weights are
    rounded likewise for the comparison, and put back.

    Weights and scales must be equal bit for bit; so are the images on most machines. Some round the same product
    differently from call to call, by where its operands lie (MKL on AMD processors): with equal weights, images may
    differ by `ROUNDING`.

    Args:
        pipeline: as trained; rendered in eval mode, left in the mode it was in.
        directory: what `save_lora` wrote into.
        render: makes images from a pipeline, the same for the same weights: fixed seeds, eta = 0 or a fixed generator.

    Returns:
        The largest difference of the images; 0 where they are equal bit for bit.

    Raises:
        AdapterMismatchError: nothing was loaded, other layers were loaded than trained, or an image differs.
    """
    names = adapted_denoisers(pipeline)
    denoisers = nn.ModuleDict({part: getattr(pipeline, part) for part in names})
    own, reloaded = dict.fromkeys(names, ADAPTER), _load_as_users_do(pipeline, Path(directory), names)
    try:
        images, others, differing = _both(
            (pipeline, denoisers, own), (pipeline, denoisers, reloaded), directory, render
        )
    finally:
        _activate(denoisers, own)
        _delete(denoisers, reloaded)
    if images.shape != others.shape:
        difference = f"their shapes are {tuple(images.shape)} and {tuple(others.shape)}"
    elif not images.isfinite().all():
        difference = "the trained pipeline's images are not finite"
    else:
        largest = (images.double() - others.double()).abs().max().item()
        if largest == 0 or (largest <= ROUNDING and not differing):
            return largest
        difference = f"the largest difference is {largest:.3g}"
    cause = (
        f"{len(differing)} LoRA tensors differ, the first is {differing[0]}: the file was changed or belongs to "
        "another step, so save the adapter again"
        if differing
        else "All LoRA tensors and scales are equal, so the base weights, the scheduler or the rendering differ: check "
        "that render() fixes its seeds and that a fresh pipeline was loaded alike"
    )
    raise AdapterMismatchError(
        f"The reloaded adapter does not make the trained adapter's images: {difference}. {cause}."
    )


def _load_as_users_do(pipeline: Any, directory: Path, denoisers: list[str]) -> dict[str, str]:
    """By the line that the card shows; returns what peft calls the adapter that came, by denoiser."""

    def adapters(name: str) -> set[str]:
        return set(getattr(getattr(pipeline, name), "peft_config", {}))

    there = {name: adapters(name) for name in denoisers}
    with _without_text_encoder_notice(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the trained one, as is meant
        if all(diffusers_loads(pipeline, getattr(pipeline, name)) for name in denoisers):
            for folder, options in {adapter_folder(name): adapter_loading(name) for name in denoisers}.items():
                pipeline.load_lora_weights(str(directory / folder), **options)
        else:
            load_lora(pipeline, directory)
    return {name: adapter for name in denoisers for adapter in adapters(name) - there[name]}


# A pipeline, its denoisers by name, and what peft calls the adapter in each.
_Adapted = tuple[Any, nn.ModuleDict, Mapping[str, str]]


def _both(
    trained: _Adapted, reloaded: _Adapted, directory: str | Path, render: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor, list[str]]:
    """Both adapters' images, and the names of the LoRA tensors that differ.

    Raises:
        AdapterMismatchError: other layers or scales were loaded than trained.
    """
    expected, loaded = _same_layers(trained, reloaded, directory)
    scales, loaded_scales = _scales(trained), _scales(reloaded)
    wrong = [name for name, scale in scales.items() if loaded_scales.get(name) != scale]
    if wrong:
        raise AdapterMismatchError(
            f"The reloaded adapter has another scale than the trained one in {len(wrong)} of {len(scales)} layers: in "
            f"{wrong[0]} expected {scales[wrong[0]]:g}, got {loaded_scales.get(wrong[0])}. The scales are in the "
            "file's metadata: save the adapter again with save_lora."
        )
    images = []
    with _eval_mode(trained[1]), _rounded(expected, loaded), torch.no_grad():
        differing = [key for key in expected if not torch.equal(expected[key].to(loaded[key].device), loaded[key])]
        for pipeline, denoisers, adapters in (trained, reloaded):
            _activate(denoisers, adapters)
            images.append(render(pipeline))
    return images[0], images[1], differing


def _activate(denoisers: nn.ModuleDict, adapters: Mapping[str, str]) -> None:
    """Leaves these adapters alone at work."""
    for part, name in adapters.items():
        for layer in _lora_layers(denoisers[part]):
            layer.set_adapter(name)


def _delete(denoisers: nn.ModuleDict, adapters: Mapping[str, str]) -> None:
    for part, name in adapters.items():
        for layer in _lora_layers(denoisers[part]):
            layer.delete_adapter(name)
        del denoisers[part].peft_config[name]  # type: ignore[operator, union-attr]


def _lora_layers(denoiser: nn.Module) -> list[LoraLayer]:
    return [module for module in denoiser.modules() if isinstance(module, LoraLayer)]


def _scales(adapted: _Adapted) -> dict[str, float]:
    """What each layer's product is multiplied by."""
    _, denoisers, adapters = adapted
    return {
        f"{part}.{path}": module.scaling[name]
        for part, name in adapters.items()
        for path, module in denoisers[part].named_modules()
        if isinstance(module, LoraLayer) and name in module.scaling
    }


def _same_layers(
    trained: _Adapted, reloaded: _Adapted, directory: str | Path
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trained adapter's parameters and those that were loaded, by the same names.

    Raises:
        AdapterMismatchError: nothing was loaded, or other layers than were trained.
    """
    expected, loaded = _named(trained), _named(reloaded)
    if not loaded:
        raise AdapterMismatchError(
            f"load_lora_weights({str(directory)!r}) loaded nothing, without an error: expected {len(expected)} LoRA "
            f"tensors for the {' and the '.join(trained[1])}. The folder must hold {WEIGHT_NAME} as save_lora writes "
            "it (a folder of peft's save_pretrained has other names and is ignored). Save the adapter again with "
            "save_lora."
        )
    if loaded.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
        raise AdapterMismatchError(
            f"{directory} holds another set of layers than was trained: expected {len(expected)} LoRA tensors, got "
            f"{len(loaded)}; missing {missing[:3]}, unexpected {extra[:3]}. Save the adapter again with save_lora."
        )
    return expected, loaded


def _named(adapted: _Adapted) -> dict[str, nn.Parameter]:
    """The adapters' parameters, named without the adapters' own names."""
    _, denoisers, adapters = adapted
    return {
        f"{part}.{key}": parameter
        for part, name in adapters.items()
        for key, parameter in _named_without_adapter(denoisers[part], name).items()
    }


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
def _without_text_encoder_notice() -> Iterator[None]:
    """Drops diffusers' long notice that an adapter of the denoiser has no part for the text encoder."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    logger = logging.getLogger("diffusers.loaders.lora_base")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
